"""What a resumed run may change: what training does not depend on, and where its inputs lie, but not what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lora_runs import write
from safetensors.torch import load_file, save_file

from vidaccel.lora import run
from vidaccel.lora.checkpoints.checkpoint import CheckpointError, CheckpointFolder
from vidaccel.lora.data.held_out import hold_out
from vidaccel.lora.recipes.base import SEEDED
from vidaccel.lora.stopping import Stopped


@pytest.fixture
def stopped(tmp_path, text_base, autoencoder_folder, video_folder, stop_after) -> Path:
    """Settings of a run that was stopped after its first step, whose models and videos are in this folder."""
    shutil.copytree(text_base, tmp_path / "base")
    shutil.copytree(autoencoder_folder, tmp_path / "new")
    shutil.copytree(video_folder, tmp_path / "videos")
    content = {
        "recipe": "ae_adapt",
        "out": str(tmp_path / "run"),
        "model": {"base": str(tmp_path / "base"), "autoencoder": str(tmp_path / "new")},
        "data": {
            "kind": "videos",
            "folder": str(tmp_path / "videos"),
            "sizes": [{"frames": 8, "height": 32, "width": 64}],
        },
        "phases": {"align": {"steps": 0}, "head": {"steps": 2, "learning_rate": 0.01}, "lora": {"steps": 0}},
        "validation": {"clips": 1},
        "loop": {"tracker": "none", "device": "cpu", "log_every": 1},
    }
    (tmp_path / "a.yaml").write_text(json.dumps(content))
    stop_after(1)
    with pytest.raises(Stopped):
        run("ae_adapt", tmp_path / "a.yaml")
    return tmp_path / "a.yaml"


def test_moved_inputs_and_another_device_are_no_other_training(stopped):
    folder = stopped.parent
    changes = ["loop.device=auto", "loop.gradient_checkpointing=true"] if not torch.cuda.is_available() else []
    for name, setting in {"base": "model.base", "new": "model.autoencoder", "videos": "data.folder"}.items():
        (folder / name).rename(folder / f"moved_{name}")
        changes.append(f"{setting}={folder / f'moved_{name}'}")
    assert Path(run("ae_adapt", stopped, changes, "latest")["pipeline"]).is_dir()


@pytest.mark.parametrize("what", ["model.base", "model.autoencoder", "data.folder (videos)", "caption"])
def test_inputs_that_were_changed_are_refused(stopped, what):
    folder = stopped.parent
    if what == "caption":
        file, what = folder / "videos" / "metadata.jsonl", "data.folder (videos)"
        file.write_text(file.read_text().replace("video a", "another caption"))
    elif what == "data.folder (videos)":
        shutil.copy(folder / "videos" / "d.mp4", folder / "videos" / "a.mp4")
    else:
        part = folder / "new" if what == "model.autoencoder" else folder / "base" / "transformer"
        file = part / "diffusion_pytorch_model.safetensors"
        save_file({name: value + 1 for name, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="may be moved, but not changed") as caught:
        run("ae_adapt", stopped, resume="latest")
    assert f": {what}." in str(caught.value)
    assert ("the order of the files" in str(caught.value)) == what.startswith("data.")


def test_a_checkpoint_has_the_adapter_so_far(stopped, text_base):
    """It loads where it lies, before the run is finished, and is what the run would have written."""
    from vidaccel.pipelines import DCVideoGenPipeline

    (checkpoint,) = (stopped.parent / "run" / "checkpoints").iterdir()
    pipe = DCVideoGenPipeline.from_pretrained(checkpoint / "adapter")
    weights = load_file(checkpoint / "weights.safetensors")
    assert weights
    for name, value in weights.items():
        assert torch.equal(pipe.transformer.get_parameter(name).float(), value), name


def test_a_run_from_before_there_was_a_seeded_order_keeps_its_measured_clips(stopped, monkeypatch):
    """Else a resume would train on what was measured."""
    seeds = []
    monkeypatch.setattr(
        "vidaccel.lora.recipes.encoded_clips.hold_out",
        lambda dataset, sizes, count, seed: seeds.append(seed) or hold_out(dataset, sizes, count, seed),
    )
    run("ae_adapt", stopped, resume="latest")
    folder = stopped.parent / "run" / "checkpoints"
    state = torch.load(min(folder.iterdir()) / "state.pt", weights_only=True)
    old = {name: value for name, value in state["state"]["inputs"].items() if name != SEEDED}
    monkeypatch.setattr("vidaccel.lora.checkpoints.checkpoint.CheckpointFolder.load", with_inputs(old))
    run("ae_adapt", stopped, resume=str(min(folder.iterdir())))
    assert seeds == [0, None]


def with_inputs(inputs):
    """Loading, of a checkpoint that has these."""
    load = CheckpointFolder.load

    def loaded(self, path):
        checkpoint = load(self, path)
        checkpoint.state["inputs"] = inputs
        return checkpoint

    return loaded


@pytest.mark.parametrize(
    ("optimizer", "older", "words"),
    [
        ("adamw", lambda name, parameter: parameter.ndim >= 2, r"31 with 0.5, 39 with 0 then, .* with 0.5 now"),
        ("muon", lambda name, parameter: True, r"\d+ with 0.5, \d+ with 0.5 then, \d+ with 0.5, \d+ with 0 now"),
    ],
)
def test_a_checkpoint_with_weight_decay_on_other_parameters_is_refused(
    tmp_path, text_base, stop_after, monkeypatch, optimizer, older, words
):
    """As older versions wrote them: torch's error of groups of other sizes, or their weight decay without a word."""
    sections = {"gft": {"train": "full", "max_scale": 4}, "validation": {"prompts": [], "clips": 0}}
    train = {"optimizer": optimizer, "weight_decay": 0.5}
    file = write(tmp_path, text_base, recipe="gft", train=train, **sections)
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "lora"}))
    stop_after(1)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("vidaccel.lora.optim.decays", older)
        run("gft", file)
    with pytest.raises(CheckpointError, match=f"gave weight decay to other parameters .*{words}.: go on with that ve"):
        run("gft", file, resume="latest")


def test_weights_of_another_shape_are_named(tmp_path, text_base, stop_after, monkeypatch):
    file = write(tmp_path, text_base, validation={"prompts": [], "clips": 0})
    stop_after(1)
    with pytest.raises(Stopped):
        run("lora", file)
    load = CheckpointFolder.load

    def loaded(self, path):
        checkpoint = load(self, path)
        name = min(checkpoint.weights)
        checkpoint.weights[name] = checkpoint.weights[name].flatten()
        return checkpoint

    monkeypatch.setattr(CheckpointFolder, "load", loaded)
    with pytest.raises(
        CheckpointError, match=r"^\S+ has the shape \[\d+\] in the checkpoint, and \[\d+, \d+\] in this"
    ):
        run("lora", file, resume="latest")


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_checkpoint_that_lacks_moments_is_refused(tmp_path, text_base, stop_after, monkeypatch, optimizer):
    """The run went on with new ones without a word."""
    file = write(tmp_path, text_base, train={"optimizer": optimizer}, validation={"prompts": [], "clips": 0})
    stop_after(1)
    with pytest.raises(Stopped):
        run("lora", file)
    load = CheckpointFolder.load

    def without(spoil):
        def loaded(self, path):
            checkpoint = load(self, path)
            spoil(checkpoint.state)
            return checkpoint

        monkeypatch.setattr(CheckpointFolder, "load", loaded)

    def of_before(state):
        del state["moments"]
        state["optimizer"]["state"].clear()

    for spoil in (lambda state: state["optimizer"]["state"].popitem(), of_before):
        without(spoil)
        with pytest.raises(CheckpointError, match=r"has \d+ moments of its optimiser, and \d+ or more were written"):
            run("lora", file, resume="latest")
    without(lambda state: state.pop("moments"))
    assert run("lora", file, resume="latest")


def test_a_checkpoint_with_this_weight_decay_is_continued(tmp_path, text_base, stop_after):
    """Its learning rate, which the groups have too, may be another."""
    train = {"optimizer": "muon", "weight_decay": 0.5}
    file = write(tmp_path, text_base, train=train, validation={"prompts": [], "clips": 0})
    stop_after(1)
    with pytest.raises(Stopped):
        run("lora", file)
    assert run("lora", file, ["train.learning_rate=0.001"], "latest")
