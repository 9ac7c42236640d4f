"""`vidaccel.tune` on the built-in model at a small size; the clock counts layers of the transformer that run."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from html import unescape

import filelock
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from layer_clock import layer_clock
from safetensors.torch import load_file, save_file

import vidaccel
from vidaccel import SVG2, DenseSchedule, Preset, demo
from vidaccel.attention.call_checks import NotFinite
from vidaccel.generation.alone import LOCK, OWNER, alone
from vidaccel.generation.errors import BadInput
from vidaccel.generation.models.inspected import inspect_pipeline
from vidaccel.generation.models.schedulers import changed_scheduler, scheduler_words, stated, stated_in_files
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.tuning import bench, space
from vidaccel.generation.tuning.identity import (
    others_in_files,
    weights_in_files,
    weights_of_others,
    weights_of_transformers,
)
from vidaccel.generation.tuning.journal import FILE, Journal
from vidaccel.generation.tuning.trajectory import probe, record
from vidaccel.pipelines.presets import Cache, Compile, Quantize, load_preset

PROMPTS = demo.HELD_OUT_PROMPTS[:2]
SMALL = {"frames": 9, "height": 64, "width": 64, "steps": 4}
TINY = {"frames": 5, "height": 32, "width": 32, "steps": 4}
CACHE_ALONE = {"levers": ("cache",), "caches": ("first_block",), "effort": "quick", "progress": False}


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def thresholds(monkeypatch):
    """One that skips nothing of a short run, and one that skips all after the first step."""
    monkeypatch.setitem(space.THRESHOLDS["first_block"], "quick", (0.001, 1e3))


@pytest.fixture
def settings(pipe) -> Settings:
    return Settings(PROMPTS[0], seed=3, **SMALL).checked(inspect_pipeline(pipe))


# -- single steps ------------------------------------------------------------------------------------------------------


def test_steps_are_measured_on_the_dense_run(pipe, settings, layers):
    trajectory, frames = record(pipe, settings, layers)
    assert trajectory.steps == (0, 0, 1, 1, 2, 2, 3, 3) and trajectory.step_seconds == 12 and trajectory.whole == 48
    made = vidaccel.generate(pipe, PROMPTS[0], seed=3, method="dense", progress=False, **SMALL)
    assert np.array_equal(frames, made.frames)  # recording changes nothing
    before = layers()
    same = probe(pipe, settings, trajectory, Preset(name="same"), (1, 3), clock=layers)
    assert layers() - before == 24  # the steps that are not measured are not computed
    assert same.errors == {1: 0.0, 3: 0.0} and same.seconds == {1: 12.0, 3: 12.0}
    sparse = Preset(name="a", method=SVG2(density=0.5, q_clusters=4, schedule=DenseSchedule(first_steps=2)))
    own = probe(pipe, settings, trajectory, sparse, range(4), rows=16, clock=layers)
    assert own.errors[0] == own.errors[1] == 0.0 and 0 < own.errors[2] < 1 and 0 < own.errors[3] < 1
    assert len(own.attention) == 6 and own.attention[0][0] is None and 0 < own.attention[0][3] < 1
    skips = probe(pipe, settings, trajectory, Preset(name="b", cache=Cache("first_block", 1e3)), range(4), clock=layers)
    assert skips.computed == {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0} and skips.seconds == {0: 12.0, 1: 2.0, 2: 2.0, 3: 2.0}
    assert skips.errors[0] == 0.0 and skips.error > 0
    # The error of a step is that of the step alone: step 3 of the run that kept two steps dense, measured by itself.
    assert probe(pipe, settings, trajectory, sparse, (2, 3)).errors[2] == pytest.approx(own.errors[2])
    assert "forward" not in pipe.transformer.__dict__  # nothing is left behind


# -- whole -------------------------------------------------------------------------------------------------------------


def test_a_preset_is_found_and_generate_takes_it(pipe, layers, tmp_path):
    made = vidaccel.tune(pipe, PROMPTS, 3, out=tmp_path / "t", min_psnr=1.0, clock=layers, **CACHE_ALONE, **TINY)
    assert made.outcome == "found" and made.chosen.candidate.cache.limit == 1e3
    own = made.chosen.confirmed
    assert own.seconds == (own.computed * 6.0 + (8 - own.computed) * 1.0,) * 2 and own.dense == (48.0, 48.0)
    assert made.gain == (48.0 / own.seconds[0],) * 2 and own.computed == 2
    preset = load_preset(tmp_path / "t" / "preset.yaml")
    assert preset.cache == Cache("first_block", 1e3) and preset.num_inference_steps == 4
    assert preset.guidance_scale is None and preset.measured["guidance_scale"] == 2.0  # the model's own
    assert preset.measured["prompts"] == 2 and preset.transformer["num_layers"] == 6
    again = vidaccel.generate(pipe, PROMPTS[0], seed=3, preset=preset, progress=False, **TINY)
    assert again.account.counts()["computed"] == own.computed
    page = (tmp_path / "t" / "tune.html").read_text()
    assert made.command.endswith(f"--preset {tmp_path / 't' / 'preset.yaml'} --frames 5 --height 32 --width 32")
    assert f"<code>{made.command}</code>" in unescape(page)
    assert repr(made) == f"<vidaccel tune: found. {made.in_words()}>"
    assert "<h1>The fastest preset within PSNR at least 1 dB</h1>" in page
    assert made.in_words() in page and "<svg" in page and "first_block 0.001" in page
    numbers = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert numbers["outcome"] == "found" and len(numbers["tried"]) == 2
    assert {f.name for f in (tmp_path / "t").iterdir()} == {
        "dense.0.npz", "dense.1.npz", FILE, LOCK, "preset.yaml", "tune.html", "tune.json",
    }  # fmt: skip


def test_passes_are_told_of_all_prompts(pipe, layers, tmp_path, monkeypatch):
    """A cache that goes by content skips more of some."""
    monkeypatch.setitem(space.THRESHOLDS["first_block"], "quick", (0.3,))
    options = {**TINY, "steps": 8}
    made = vidaccel.tune(
        pipe, PROMPTS, [3, 3], out=tmp_path / "t", min_psnr=1.0, clock=layers, **CACHE_ALONE, **options
    )
    cache = Preset(name="a", cache=Cache("first_block", 0.3))
    runs = [vidaccel.generate(pipe, p, seed=3, preset=cache, progress=False, **options) for p in PROMPTS]
    each = [run.account.counts()["computed"] for run in runs]
    (tried,) = made.confirmed
    assert each[0] != each[1] and tried.confirmed.computed == sum(each) / 2 and tried.confirmed.forwards == 16
    assert f"{sum(each) / 2:g} of 16" in (tmp_path / "t" / "tune.html").read_text()


def test_a_preset_says_the_guidance_that_it_was_measured_with(pipe, layers, tmp_path):
    """Without guidance a step has one pass; without that in the preset, `generate` would make two of other weights."""
    options = {"min_psnr": 1.0, "clock": layers, **CACHE_ALONE, **TINY}
    made = vidaccel.tune(pipe, PROMPTS[:1], 3, out=tmp_path / "t", guidance_scale=1.0, **options)
    preset = load_preset(tmp_path / "t" / "preset.yaml")
    assert made.dense_seconds == 24 and preset.guidance_scale == 1.0 and preset.measured["guidance_scale"] == 1.0
    again = vidaccel.generate(pipe, PROMPTS[0], seed=3, preset=preset, progress=False, **TINY)
    assert again.account.steps[0].forwards == 1
    assert made.settings["guidance scale"] == "1" and "guidance scale 1;" in (tmp_path / "t" / "tune.html").read_text()


@pytest.mark.parametrize("fault", ["NaN in a step", "NaN in q", "no memory"])
def test_one_candidate_that_fails_does_not_end_the_search(pipe, layers, tmp_path, monkeypatch, fault):
    def failing(pipe, settings, trajectory, preset, *args, **options):
        made = probe(pipe, settings, trajectory, preset, *args, **options)
        if preset.cache is None or preset.cache.limit < 1:
            return made
        if fault == "NaN in q":
            raise NotFinite("NaN in q")
        if fault == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return replace(made, errors=dict.fromkeys(made.errors, math.nan))

    options = {"out": tmp_path / "t", "clock": layers, **CACHE_ALONE, **TINY}
    with monkeypatch.context() as patch:
        patch.setattr(bench, "probe", failing)
        made = vidaccel.tune(pipe, PROMPTS, min_psnr=1.0, **options)
    why = "out of memory" if fault == "no memory" else "it made NaN or infinity"
    assert why in (tmp_path / "t" / "tune.html").read_text() and made.outcome != "found"
    # A device may have been busy; numbers that are none stay so.
    again = vidaccel.tune(pipe, PROMPTS, min_psnr=1.0, **options)
    assert (again.outcome == "found") == (fault == "no memory")


def test_prompts_that_are_cut_off_are_told_and_stay_in_the_journal(pipe, layers, tmp_path, caplog):
    options = {"out": tmp_path / "t", "clock": layers, "confirm": 1, **CACHE_ALONE, **TINY}
    said = "prompt has 600 tokens, and the text encoder reads the first 511; cut off:"
    for _ in range(2):  # the second time nothing runs
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="vidaccel"):
            made = vidaccel.tune(pipe, [PROMPTS[0], "circle " * 600, "circle " * 600], min_psnr=1.0, **options)
        (note,) = [note for note in made.notes if "cut off" in note]
        assert note.startswith(said) and [r.getMessage() for r in caplog.records].count(note) == 1
    assert said in (tmp_path / "t" / "tune.html").read_text()


def test_weights_that_were_trained_on_in_place_are_another_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(demo.path(), folder)
    for part, own in (("transformer", weights_in_files), ("vae", others_in_files), ("text_encoder", others_in_files)):
        before = weights_in_files(str(folder)), others_in_files(str(folder))
        file = next((folder / part).glob("*.safetensors"))
        save_file({name: 1.5 * value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
        after = weights_in_files(str(folder)), others_in_files(str(folder))
        assert [a != b for a, b in zip(before, after, strict=True)] == [own is weights_in_files, own is others_in_files]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_pipeline_with_other_weights_is_another(dtype):
    """Wherever in a weight they are, and in whatever part."""
    pipe = WanPipeline.from_pretrained(demo.path(), torch_dtype=dtype)
    both = (weights_of_transformers, weights_of_others)
    before = [told(pipe) for told in both]
    assert [told(pipe) for told in both] == before
    with torch.no_grad():
        pipe.transformer.blocks[2].attn2.to_q.weight[1:] *= 1.3
    after = [told(pipe) for told in both]
    assert after[0] != before[0] and after[1] == before[1]
    for part in (pipe.vae, pipe.text_encoder):
        before = weights_of_others(pipe)
        with torch.no_grad():
            next(part.parameters()).mul_(1.05)
        assert weights_of_others(pipe) != before
    assert weights_of_transformers(pipe) == after[0]


def test_weights_that_are_offloaded_one_by_one_count(tmp_path):
    """Their places in the modules are empty."""
    pytest.importorskip("accelerate")
    from accelerate import cpu_offload

    def told(factor: float) -> str:
        pipe = WanPipeline.from_pretrained(demo.path())
        with torch.no_grad():
            pipe.vae.decoder.conv_in.weight.mul_(factor)
        cpu_offload(pipe.vae, torch.device("cpu"))
        assert pipe.vae.decoder.conv_in.weight.is_meta
        return weights_of_others(pipe)

    assert told(1.0) == told(1.0) != told(2.0)


def test_another_scheduler_is_another_journal(pipe, layers, tmp_path, monkeypatch):
    options = {"min_psnr": 1.0, "clock": layers, **CACHE_ALONE, **TINY}
    vidaccel.tune(pipe, PROMPTS[:1], out=tmp_path / "t", **options)
    monkeypatch.setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=8.0))
    with pytest.raises(BadInput, match="scheduler: _class_name was .UniPCMultistep.* and is .FlowMatchEuler"):
        vidaccel.tune(pipe, PROMPTS[:1], out=tmp_path / "t", **options)
    folder = tmp_path / "model"
    shutil.copytree(demo.path(), folder)
    identity = {"scheduler": stated_in_files(str(folder))}
    Journal(tmp_path / "of files", identity)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flow_shift": 12.0}))
    with pytest.raises(BadInput, match=r"else: scheduler: flow_shift was 3\.0 and is 12\.0\. Give"):
        Journal(tmp_path / "of files", {"scheduler": stated_in_files(str(folder))})


def test_a_preset_names_the_scheduler_that_it_was_measured_with(pipe, layers, tmp_path, monkeypatch):
    """Where it is not that of the model's files: the command makes the video that was measured."""
    own = pipe.scheduler
    monkeypatch.setattr(pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=8.0))
    options = {"min_psnr": 1.0, "clock": layers, **CACHE_ALONE, **TINY}
    made = vidaccel.tune(pipe, PROMPTS[:1], 3, out=tmp_path / "t", **options)
    assert made.settings["scheduler"] == "FlowMatchEulerDiscreteScheduler (shift 8)" and not made.notes
    here = vidaccel.generate(pipe, PROMPTS[0], seed=3, preset=tmp_path / "t" / "preset.yaml", progress=False, **TINY)
    file = load_preset(tmp_path / "t" / "preset.yaml")
    assert file.scheduler.name == "FlowMatchEulerDiscreteScheduler" and file.scheduler.settings["shift"] == 8.0
    again = vidaccel.generate("demo", PROMPTS[0], seed=3, preset=file, progress=False, device="cpu", **TINY)
    assert np.array_equal(here.frames, again.frames)
    # Of the same class with another setting; and of the files' own.
    monkeypatch.setattr(pipe, "scheduler", type(own).from_config(own.config, flow_shift=9.0))
    assert changed_scheduler(pipe, str(demo.path())).settings["flow_shift"] == 9.0
    monkeypatch.setattr(pipe, "scheduler", own)
    assert changed_scheduler(pipe, str(demo.path())) is None
    assert scheduler_words(stated(own)) == scheduler_words(stated_in_files(str(demo.path())))


def test_loras_of_the_pipeline_are_said_to_be_missing_in_the_preset(tmp_path):
    peft = pytest.importorskip("peft")
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "mine")
    with layer_clock(pipe) as clock:
        made = vidaccel.tune(pipe, PROMPTS[:1], 3, out=tmp_path / "t", min_psnr=1.0, clock=clock, **CACHE_ALONE, **TINY)
    assert made.settings["LoRAs"] == "mine" and "--lora ..." in made.command
    assert any("has LoRAs, which are not in the preset: mine. Give them" in note for note in made.notes)


def test_an_interrupted_run_goes_on_and_another_budget_knows_all(pipe, layers, tmp_path, monkeypatch):
    options = {"out": tmp_path / "t", "clock": layers, **CACHE_ALONE, **TINY}
    whole = Journal.put

    def full(self, key, value):
        if key.startswith("mean error of videos"):
            raise KeyboardInterrupt
        whole(self, key, value)

    monkeypatch.setattr(Journal, "put", full)
    with pytest.raises(KeyboardInterrupt):
        vidaccel.tune(pipe, PROMPTS, min_psnr=1.0, **options)
    assert not (tmp_path / "t" / "preset.yaml").exists()
    monkeypatch.setattr(Journal, "put", whole)
    before = (tmp_path / "t" / FILE).read_text()
    with (tmp_path / "t" / FILE).open("a") as file:
        file.write('{"key": "torn')
    made = vidaccel.tune(pipe, PROMPTS, min_psnr=1.0, **options)
    after = (tmp_path / "t" / FILE).read_text()
    assert made.outcome == "found" and after.startswith(before) and "torn" not in after
    # All is known, so nothing runs.
    ran = layers()
    assert vidaccel.tune(pipe, PROMPTS, min_psnr=1.0, **options).to_dict() == made.to_dict() and layers() == ran
    # A dense video that was damaged since.
    video = tmp_path / "t" / "dense.0.npz"
    for damaged in (b"garbage", b"", video.read_bytes()[:-50]):
        kept = video.read_bytes()
        video.write_bytes(damaged)
        with pytest.raises(BadInput, match=r"dense\.0\.npz, .* cannot be read\. Delete "):
            vidaccel.tune(pipe, PROMPTS, min_psnr=1.0, **options)
        video.write_bytes(kept)
    # A budget that nothing meets: the preset of the other budget does not pass for an answer to it.
    nothing = vidaccel.tune(pipe, PROMPTS, min_psnr=99.0, **options)
    assert nothing.outcome == "nothing within the budget" and nothing.preset is None and nothing.chosen is not None
    assert not (tmp_path / "t" / "preset.yaml").exists()
    assert any("preset.yaml of an earlier call was removed" in note for note in nothing.notes)
    with pytest.raises(BadInput, match=r"measurements of something else: steps was 4 and is 5\. Give another folder"):
        vidaccel.tune(pipe, PROMPTS, min_psnr=1.0, **options | {"steps": 5})


def test_the_negative_prompt_of_what_was_measured_is_told(pipe, layers, tmp_path):
    options = {"min_psnr": 1.0, "clock": layers, "negative_prompt": "it's grey", **CACHE_ALONE, **TINY}
    made = vidaccel.tune(pipe, PROMPTS[:1], 3, out=tmp_path / "t", **options)
    assert load_preset(tmp_path / "t" / "preset.yaml").measured["negative_prompt"] == "it's grey"
    assert shlex.split(made.command)[-2:] == ["--negative-prompt", "it's grey"]
    page = (tmp_path / "t" / "tune.html").read_text()
    assert "<dt>negative prompt</dt><dd>it&#39;s grey</dd>" in page


def test_turns_of_an_earlier_call_hold_for_another_budget(pipe, layers, tmp_path):
    """Videos that were made while the machine was busy take long beside the dense ones, and turns have told better."""
    options = {"out": tmp_path / "t", "clock": layers, **CACHE_ALONE, **TINY}
    first = vidaccel.tune(pipe, PROMPTS, min_psnr=1.0, **options)
    lines = [json.loads(line) for line in (tmp_path / "t" / FILE).read_text().splitlines()]
    for line in lines:
        if line.get("key", "").startswith("mean error of videos"):
            line["value"]["seconds"] = [100.0 for _ in line["value"]["seconds"]]
    (tmp_path / "t" / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = layers()
    made = vidaccel.tune(pipe, PROMPTS, max_time_ratio=0.9, **options | {"confirm": 1})
    assert made.outcome == "found" and made.gain == first.gain and layers() == ran
    assert {t.confirmed.gain for t in made.confirmed} == {first.gain}


def test_one_at_a_time_in_a_folder(pipe, layers, tmp_path):
    """Two would write into one journal; what a process that was killed leaves is in nobody's way."""
    folder = tmp_path / "t"
    code = f"""
import sys, time
from pathlib import Path
from vidaccel.generation.alone import alone
with alone(Path({str(folder)!r})):
    print("in", flush=True)
    time.sleep(600)
"""
    options = {"out": folder, "min_psnr": 1.0, "clock": layers, **CACHE_ALONE, **TINY}
    (tmp_path / "importable").mkdir()
    (tmp_path / "importable" / "vidaccel").symlink_to(vidaccel.__path__[0], target_is_directory=True)
    path = os.pathsep.join([str(tmp_path / "importable"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    try:
        assert other.stdout.readline() == b"in\n"
        who = rf"process {other.pid} on .*, since .*, measures in it\. Wait"
        with pytest.raises(BadInput, match=rf"^out is {folder}: {who}"):
            vidaccel.tune(pipe, PROMPTS, **options)
        assert {f.name for f in folder.iterdir()} == {LOCK, OWNER}
    finally:
        other.kill()
        other.communicate()
    assert (folder / OWNER).exists()  # it had no time to tidy up
    assert vidaccel.tune(pipe, PROMPTS, **options).outcome == "found"
    assert not (folder / OWNER).exists()
    with alone(folder), pytest.raises(BadInput, match=f"process {os.getpid()} on "), alone(folder):
        pass


def test_a_lock_needs_no_room(tmp_path):
    """Who has it is written for a message alone, and the disk may be full of what an interrupted run left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[0][1]))
    try:
        with alone(tmp_path), pytest.raises(BadInput, match="works in it|measures in it"), alone(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    with alone(tmp_path):
        pass


def test_a_file_system_without_locks_is_no_reason_not_to_tune(tmp_path, monkeypatch, caplog):
    def refused(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    with caplog.at_level(logging.WARNING), alone(tmp_path), alone(tmp_path):
        assert "cannot be locked ([Errno" in caplog.text and "No locks available): start no second tune" in caplog.text


def test_the_page_says_what_was_sought(pipe, layers, tmp_path):
    vidaccel.tune(pipe, PROMPTS, out=tmp_path, max_time_ratio=0.9, clock=layers, **CACHE_ALONE, **TINY)
    title = "<h1>The preset nearest to dense within at most 0.9 of the dense time</h1>"
    assert title in (tmp_path / "tune.html").read_text()


def test_sparse_attention_of_a_short_video_is_no_gain(pipe, layers, tmp_path):
    """By this clock a sparse step takes as long as a dense one."""
    options = {"levers": ("sparse",), "methods": ("svg2",), "effort": "quick", "progress": False, **SMALL}
    made = vidaccel.tune(pipe, PROMPTS[:1], out=tmp_path / "t", min_psnr=1.0, clock=layers, **options)
    assert made.outcome == "no gain" and made.in_words().startswith("No gain here: within PSNR at least 1 dB")
    assert not (tmp_path / "t" / "preset.yaml").exists() and not made.confirmed
    assert "no gain: a step takes" in (tmp_path / "t" / "tune.html").read_text()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_layers_in_8_bits_are_measured_and_the_weights_come_back(pipe, tmp_path):
    """By a clock on which a step in 8 bits takes half the time."""
    now = [0.0]

    def counted(module, *_):
        now[0] += 1.0 if type(module.to_q.weight.data) is torch.Tensor else 0.5

    hooks = [block.attn1.register_forward_pre_hook(counted) for block in pipe.transformer.blocks]
    weight = pipe.transformer.blocks[0].ffn.net[2].weight.detach().clone()
    options = {"levers": ("quantize",), "effort": "quick", "progress": False, **SMALL}
    try:
        made = vidaccel.tune(pipe, PROMPTS[:1], out=tmp_path / "t", min_psnr=10.0, clock=lambda: now[0], **options)
    finally:
        for hook in hooks:
            hook.remove()
    assert made.outcome == "found" and made.preset.quantize == Quantize("int8", activations=True)
    assert made.gain == (2.0,) and 0 < made.chosen.confirmed.error < 0.2
    (fp8,) = (each for each in made.tried if each.confirmed is None)
    assert "need a GPU that multiplies float8" in fp8.why
    assert load_preset(tmp_path / "t" / "preset.yaml").quantize == made.preset.quantize
    assert torch.equal(pipe.transformer.blocks[0].ffn.net[2].weight, weight)


@pytest.mark.compiler
def test_compiled_blocks_are_measured_without_their_compilation(pipe, tmp_path):
    """By a clock on which a compiled block takes half the time."""
    now = [0.0]

    def counted(*_):  # within what is timed of a pass, and outside of the blocks
        now[0] += sum(1.0 if block._compiled_call_impl is None else 0.5 for block in pipe.transformer.blocks)

    options = {"levers": ("compile",), "effort": "quick", "progress": False, **SMALL}
    hook = pipe.transformer.condition_embedder.register_forward_pre_hook(counted)
    try:
        made = vidaccel.tune(pipe, PROMPTS[:1], out=tmp_path / "t", min_psnr=40.0, clock=lambda: now[0], **options)
    finally:
        hook.remove()
    assert made.outcome == "found" and made.preset.compile == Compile() and made.gain == (2.0,)
    assert 0 <= made.chosen.confirmed.error < 1e-5 and made.chosen.confirmed.mean_psnr > 60
    assert load_preset(tmp_path / "t" / "preset.yaml").compile == Compile()
    assert all(block._compiled_call_impl is None for block in pipe.transformer.blocks)


# -- bad input, before anything is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_psnr": None}, r"^min_psnr is needed"),
        ({"prompts": ()}, r"^prompts there are none"),
        ({"seeds": (1, 2, 3)}, r"^seeds there are 3, for 2 prompts"),
        ({"seeds": -1}, r"^seeds is -1: it must be between 0 and"),
        ({"prompts": ("a dot", "")}, r"^prompts one of them is empty"),
        ({"methods": "sla"}, r"^methods is sla: it is none of the methods"),
        ({"caches": "teacache"}, r"^caches is teacache"),
        ({"levers": ("sparse", "magic")}, r"^levers is magic: there is none of that name; there are sparse, cache"),
        ({"caches": ("teacache",)}, r"^caches is teacache: .* first_block, magcache, seacache, taylorseer, cache_dit"),
        ({"methods": ("sla",)}, r"^methods is sla: it is none of the methods that can be measured without training"),
        ({"effort": "heroic"}, r"^effort is heroic: .* quick, normal, thorough"),
        ({"confirm": 0}, r"^confirm is 0: it must be a whole number of at least 1"),
        ({"steps": 1}, r"^steps is 1: a run of one step has nothing to tune"),
        ({"frames": 10}, r"^frames is 10: this model makes 4k\+1 frames"),
        (
            {"levers": ("cache",), "caches": ("cache_dit",)},
            r"^levers leaves nothing to try \(cache_dit: .*pip install",
        ),
        ({"levers": ("cache",), "methods": ("radial",)}, r"^methods given without the lever sparse, which tries them"),
        ({"levers": ("sparse",), "caches": "magcache"}, r"^caches given without the lever cache, which tries them"),
        ({"levers": ("precision",)}, r"^levers leaves nothing to try"),
        ({"levers": ("quantize",)}, r"^levers leaves nothing to try \(quantize: .*pip install torchao"),
        ({"levers": ("adapter",), "guidance_scale": 1.0}, r"^levers leaves nothing to try"),
    ],
)
def test_bad_input(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr("vidaccel.generation.tuning.api.load", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr("importlib.util.find_spec", _without("cache_dit", "torchao"))
    asked = {"prompts": PROMPTS, "out": tmp_path / "t", "min_psnr": 30.0, "device": "cpu", **SMALL} | changes
    with pytest.raises(BadInput, match=message):
        vidaccel.tune("demo", **asked)
    assert not (tmp_path / "t").exists()


def test_a_preset_that_no_search_has_made_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("vidaccel.generation.tuning.api.load", lambda *_, **__: pytest.fail("weights were read"))
    (tmp_path / "preset.yaml").write_text("version: 1\n")
    with pytest.raises(BadInput, match=r"^out is .*: it has a preset\.yaml that no search has made"):
        vidaccel.tune("demo", PROMPTS, out=tmp_path, min_psnr=30.0, device="cpu", **SMALL)
    assert (tmp_path / "preset.yaml").read_text() == "version: 1\n"


def test_layers_in_8_bits_are_not_tried_when_offloading_by_blocks(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("vidaccel.generation.job.choose_device", lambda *_: torch.device("cpu"))  # it refuses a CPU
    with pytest.raises(BadInput, match=r"leaves nothing to try \(quantize: not when offloading by blocks: it moves"):
        vidaccel.tune(
            "demo", PROMPTS, out=tmp_path / "t", min_psnr=30.0, levers=("quantize",), offload="blocks", **SMALL
        )


def _without(*packages: str):
    find = importlib.util.find_spec
    return lambda name, *more: None if name in packages else find(name, *more)


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"^out is .*file: it is a file\. Give a folder"):
        vidaccel.tune("demo", PROMPTS, out=tmp_path / "file", min_psnr=30, device="cpu")
    for text in ("no journal\n", '{"head": [1]}\n', "[]\n", "[" * 100_000 + "\n"):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(BadInput, match=r"its journal\.jsonl cannot be read .* Give another folder, or remove it"):
            Journal(tmp_path, {"model": "demo"})
