"""Runs of two processes against one. They share one launch, which takes longer than the runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vidaccel.lora import run
from vidaccel.lora.distributed.processes import Process
from vidaccel.lora.stopping import StopRequested

SCRIPT = Path(__file__).with_name("two_processes.py")


def write(folder: Path, name: str, content: dict, **sections) -> str:
    """Settings in a file; the path."""
    content = {**content, "out": str(folder / name), "loop": {"tracker": "none", "device": "cpu", "log_every": 1}}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({**content, **sections}))
    return str(file)


def autoencoder(folder: Path, name: str, batch_size: int, **phase) -> str:
    """Settings of three steps, unless the phase says otherwise."""
    model = {"latent_channels": 4, "block_out_channels": [8] * 7, "layers_per_block": [0] + [1] * 6, "chunk_size": 8}
    content = {
        "recipe": "autoencoder",
        "model": model,
        "data": {"kind": "demo", "clips": 9, "sizes": [{"frames": 8, "height": 32, "width": 32}]},
        "phases": [
            {"name": "train", "steps": 3, "learning_rate": 1e-3, "batch_size": batch_size, "ema_decay": 0.9, **phase}
        ],
        "validation": {"clips": 1},
        "statistics_clips": 1,
    }
    return write(folder, name, content)


def tiny_decoder(folder: Path, name: str, batch_size: int) -> str:
    """Settings of three steps on the latents of the built-in autoencoder, against a discriminator."""
    content = {
        "recipe": "tiny_decoder",
        "model": {"base": "demo-dc"},
        "decoder": {"block_out_channels": [8] * 4, "layers_per_block": 1, "patch_size": 4},
        "loss": {"edges": 0.5, "adversarial": 0.1, "adversarial_from": 1},
        "data": {"kind": "demo", "clips": 9, "sizes": [{"frames": 8, "height": 32, "width": 32}]},
        "phases": [{"name": "train", "steps": 3, "learning_rate": 1e-3, "batch_size": batch_size, "ema_decay": 0.9}],
        "validation": {"clips": 1},
    }
    return write(folder, name, content)


def ae_adapt(folder: Path, name: str, batch_size: int, base: Path, new: Path) -> str:
    """Settings of five steps in three phases, with a cache."""
    more = {"batch_size": batch_size, "learning_rate": 0.01}
    content = {
        "recipe": "ae_adapt",
        "model": {"base": str(base), "autoencoder": str(new)},
        "data": {
            "kind": "demo",
            "clips": 7,
            "sizes": [{"frames": 8, "height": 64, "width": 64}],
            "cache": str(folder / f"cache{batch_size}"),
        },
        "phases": {
            "align": {"steps": 2, **more},
            "head": {"steps": 1, **more},
            "lora": {"steps": 2, "rank": 2, "alpha": 2, "lr_warmup_steps": 0, "ema_decay": 0.5, **more},
        },
        "validation": {"clips": 2},
    }
    return write(folder, name, content)


def lora(folder: Path, name: str, batch_size: int, base: Path) -> str:
    """Settings of two steps, with sparse attention and the pass that preserves guidance."""
    content = {
        "recipe": "lora",
        "model": {"base": str(base)},
        "lora": {"rank": 2},
        "flow": {"guidance_preserving": 2},
        "attention": {"method": "radial", "density": 0.6},
        "data": {"kind": "demo", "clips": 7, "sizes": [{"frames": 9, "height": 64, "width": 64}]},
        "train": {"steps": 2, "learning_rate": 0.01, "batch_size": batch_size, "ema_decay": 0.5},
        "validation": {"clips": 2, "prompts": ["a red circle", "a blue square", "a dot"], "steps": 2},
    }
    return write(folder, name, content)


def sla(folder: Path, name: str, batch_size: int, base: Path) -> str:
    """Settings of two steps of all weights, with a layer that stays dense."""
    content = {
        "recipe": "sla",
        "model": {"base": str(base)},
        "sla": {"topk": 0.25, "block_q": 12, "block_k": 12, "dense_layers": 1},
        "data": {"kind": "demo", "clips": 7, "sizes": [{"frames": 9, "height": 64, "width": 64}]},
        "train": {"steps": 2, "learning_rate": 0.001, "batch_size": batch_size, "ema_decay": 0.5},
        "validation": {"clips": 2},
    }
    return write(folder, name, content)


def length(folder: Path, name: str, batch_size: int, base: Path) -> str:
    """Settings of two steps on longer clips, under a mask."""
    content = {
        "recipe": "length",
        "model": {"base": str(base)},
        "lora": {"rank": 2},
        "length": {"base_frames": 5},
        "attention": {"density": 0.6, "block_size": 8},
        "data": {"kind": "demo", "clips": 7, "sizes": [{"frames": 17, "height": 64, "width": 96}]},
        "train": {"steps": 2, "learning_rate": 0.01, "batch_size": batch_size, "ema_decay": 0.5},
        "validation": {"clips": 2},
    }
    return write(folder, name, content)


def consistency(folder: Path, name: str, batch_size: int, base: Path) -> str:
    """Settings of three steps with the base as teacher, in some of which the student's own states are taken."""
    content = {
        "recipe": "consistency",
        "model": {"base": str(base)},
        "lora": {"rank": 2},
        "consistency": {"steps": 2, "teacher_steps": 2, "guidance_scale": 2, "own_states": 0.5},
        "data": {"kind": "demo", "clips": 7, "sizes": [{"frames": 9, "height": 64, "width": 64}]},
        "train": {"steps": 3, "learning_rate": 0.01, "batch_size": batch_size, "ema_decay": 0.5},
        "validation": {"clips": 2},
    }
    return write(folder, name, content)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, text_base, autoencoder_folder) -> Path:
    """The folder in which two processes ran `autoencoder`, `ae_adapt`, and that once more, stopped and resumed;
    `autoencoder` with a limit of time; `tiny_decoder`; `lora`; `sla`; `length`; and `consistency`."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "path").mkdir()
    (folder / "path" / "vidaccel").symlink_to(Path(__file__).parents[2], target_is_directory=True)
    adapt = ae_adapt(folder, "adapt", 1, text_base, autoencoder_folder)
    timed = autoencoder(folder, "timed", 1, lr_scheduler="linear", max_minutes=1000)
    jobs = [
        {"recipe": "autoencoder", "config": autoencoder(folder, "train", 1), "out": str(folder / "train")},
        {"recipe": "ae_adapt", "config": adapt, "out": str(folder / "encoded"), "encode_only": True},
        {"recipe": "ae_adapt", "config": adapt, "out": str(folder / "adapt")},
        {"recipe": "ae_adapt", "config": adapt, "out": str(folder / "resumed"), "stop_after": 4},
        {"recipe": "autoencoder", "config": timed, "out": str(folder / "timed"), "fast_clock": 1e6},
        {"recipe": "tiny_decoder", "config": tiny_decoder(folder, "tiny", 1), "out": str(folder / "tiny")},
        {"recipe": "lora", "config": lora(folder, "lora", 1, text_base), "out": str(folder / "lora")},
        {"recipe": "sla", "config": sla(folder, "sla", 1, text_base), "out": str(folder / "sla")},
        {"recipe": "length", "config": length(folder, "length", 1, text_base), "out": str(folder / "length")},
        {
            "recipe": "consistency",
            "config": consistency(folder, "consistency", 1, text_base),
            "out": str(folder / "consistency"),
        },
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, str(SCRIPT), str(folder / "jobs.json"), str(port)]
    environment = {**os.environ, "PYTHONPATH": str(folder / "path"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def ranks(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The result of the last phase as each process has it."""
    return [torch.load(folder / f"rank{number}.pt") for number in range(2)]


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("loss", "validation_error") if key in row]


@pytest.mark.parametrize("recipe", ["autoencoder", "tiny_decoder", "ae_adapt", "lora", "sla", "length", "consistency"])
def test_two_processes_do_what_one_does_with_the_same_clips(launched, tmp_path, recipe, text_base, autoencoder_folder):
    if recipe == "autoencoder":
        settings, two, last = autoencoder(tmp_path, "one", 2), launched / "train", "train"
    elif recipe == "tiny_decoder":
        settings, two, last = tiny_decoder(tmp_path, "one", 2), launched / "tiny", "train"
    elif recipe in (of_loras := {"lora": lora, "sla": sla, "length": length, "consistency": consistency}):
        write_settings = of_loras[recipe]
        settings, two, last = write_settings(tmp_path, "one", 2, text_base), launched / recipe, "train"
    else:
        settings, two, last = ae_adapt(tmp_path, "one", 2, text_base, autoencoder_folder), launched / "adapt", "lora"
    first, second = ranks(two)
    run(recipe, settings)
    one = load_file(tmp_path / "one" / "phases" / f"{last}.safetensors")
    assert first.keys() == one.keys()
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)
    assert losses(two) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_two_processes_share_a_validation(launched, tmp_path, text_base):
    """Each measured all clips and made all videos. The files are those of one process, in the same order."""
    run("lora", lora(tmp_path, "one", 2, text_base))
    folders = tmp_path / "one" / "validation", launched / "lora" / "validation"
    names = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == ["00000002.png", *(f"00000002_{number}.mp4" for number in range(3))]
    one, two = (np.asarray(Image.open(folder / "00000002.png")).astype(int) for folder in folders)
    assert abs(one - two).max() <= 2
    done = [json.loads((launched / "lora" / f"done{number}.json").read_text()) for number in range(2)]
    assert done == [{"videos": 2, "batches": 1}, {"videos": 1, "batches": 1}]


@pytest.mark.parametrize(
    ("index", "sharded", "wanted"), [(0, False, [0, 2, 4]), (1, False, [1, 3]), (1, True, [0, 1, 2, 3, 4])]
)
def test_shares_of_processes(monkeypatch, index, sharded, wanted):
    """A round for each of them, also for one that has nothing left, so that all come to the same questions."""
    asked, made, others = [], [], [None]

    def gathered(self, items):
        if isinstance(items[0], dict):
            return [*items, {9: "of the other"}]
        asked.append(items[0])
        return [*items, (False, others[0])]

    monkeypatch.setattr(Process, "gathered", gathered)
    process = Process(torch.device("cpu"), index, 2, sharded=sharded)
    found = process.shared(5, lambda number: made.append(number) or str(number), "things", everywhere=True)
    assert made == wanted and found == [*map(str, wanted), *([] if sharded else ["of the other"])]
    assert len(asked) == (5 if sharded else 3)

    def stopped(number: int) -> str:
        process.stop.requested = True
        process.check_own_stop()
        return "went on"

    asked.clear()
    monkeypatch.setattr(Process, "any", lambda self, flag: flag)
    with pytest.raises(StopRequested):
        process.shared(5, stopped, "things")
    assert asked[-1] == (True, None)
    # What fails in one process ends the others, which would wait for it.
    process.stop.requested = False
    with pytest.raises(ZeroDivisionError):
        process.shared(5, lambda number: 1 / 0, "things")
    if not sharded:
        assert asked[-1] == (False, f"process {index}: division by zero")
        others[0] = "process 7: no such clip"
        with pytest.raises(OSError, match=r"another process of the run has failed \(process 7: no such clip\)"):
            process.shared(5, str, "things")


def test_samples_of_a_validation_share_a_pipeline(tmp_path, text_base, monkeypatch):
    """Of two transformers, the other one was read from the disk for each prompt."""
    from vidaccel.lora.backbones.wan_own import WanModel

    made, sampler = [], WanModel.sampler
    monkeypatch.setattr(WanModel, "sampler", lambda self, model: made.append(model) or sampler(self, model))
    run("lora", lora(tmp_path, "one", 2, text_base), ["loop.validate_every=1"])
    assert len(made) == 2


def test_two_processes_share_the_encoding(launched, tmp_path, text_base, autoencoder_folder):
    """Together they leave what one leaves, beforehand; the runs that find it, and their results, are whole."""
    assert not (launched / "encoded").exists()
    run("ae_adapt", ae_adapt(tmp_path, "one", 2, text_base, autoencoder_folder), ["phases.lora.steps=0"])
    both, alone = (
        {f.name for f in cache.rglob("*.safetensors")} for cache in (launched / "cache1", tmp_path / "cache2")
    )
    assert both == alone and len(both) >= 5 * 2 + 2
    for name in ("adapt", "resumed"):
        assert (launched / name / "pipeline" / "model_index.json").is_file()


def test_two_processes_stopped_and_resumed_end_bit_equal(launched):
    """The signal reached one of them alone."""
    straight, resumed = ranks(launched / "adapt"), ranks(launched / "resumed")
    for first, second in zip(straight, resumed, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(launched / "adapt")[-2:] == losses(launched / "resumed")[-2:]


@pytest.mark.parametrize("index", [0, 1])
def test_what_one_decides_is_told_after_a_wait_that_takes_signals(monkeypatch, index):
    """Whatever goes wrong in it: the others must not wait for ever."""
    sent, waited = [["chosen", None]], []

    def broadcast(told, source, group):
        if index:
            told[:] = sent[-1]
        sent.append(list(told))

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(Process, "wait", lambda self: waited.append(len(sent)))
    process = Process(torch.device("cpu"), index, 2)
    assert process.decided(lambda: "chosen", KeyError) == "chosen" and waited == [1]
    sent.append([None, "division by zero"])
    with pytest.raises(KeyError if index else ZeroDivisionError, match="division by zero"):
        process.decided(lambda: 1 / 0, KeyError)


@pytest.mark.parametrize(("index", "order"), [(0, ["make", "wait"]), (1, ["wait", "make"])])
def test_what_the_main_process_leaves_in_a_cache_is_made_once(index, order):
    def make() -> str:
        done.append("make")
        return "made"

    class Told(Process):
        def wait(self) -> None:
            done.append("wait")

    done: list[str] = []
    process = Told(torch.device("cpu"), index, 2)
    assert process.main_first(make) == "made" and done == order
    done.clear()
    with pytest.raises(ZeroDivisionError):
        process.main_first(lambda: 1 / 0)
    assert done == ["wait"], "the others must not wait for ever"


def test_one_clock_counts_where_time_is_limited(launched):
    """Else the learning rates of the processes would differ, and so would their weights; and one would end the run."""
    first, second = (torch.load(launched / "timed" / f"rates{number}.pt") for number in range(2))
    assert first == second and len(first) == 3
    first, second = ranks(launched / "timed")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
