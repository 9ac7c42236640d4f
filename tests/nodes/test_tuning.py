"""The Tune node without a ComfyUI: what it finds, that it can be stopped and goes on, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layer_clock import layer_clock

from vidaccel import Preset, demo
from vidaccel.generation.tuning import space
from vidaccel.generation.tuning.journal import FILE
from vidaccel.nodes.pipeline.acceleration import Acceleration
from vidaccel.nodes.pipeline.pipelines import VideoPipeline, load
from vidaccel.nodes.pipeline.residency import Residency
from vidaccel.nodes.pipeline.tuning import folder_of, tuned
from vidaccel.nodes.presets import with_preset
from vidaccel.nodes.report.wording import InputError
from vidaccel.pipelines.presets import Cache, load_preset

PROMPTS = "\n".join([demo.HELD_OUT_PROMPTS[0], "", f"  {demo.HELD_OUT_PROMPTS[1]} "])
SIZE = {"frames": 5, "height": 32, "width": 32, "steps": 4, "guidance_scale": None, "negative_prompt": ""}


class Stop(BaseException):
    """As ComfyUI's interruption."""


class Button:
    """Stops a run in the n-th pass of a part; `passes` counts."""

    def __init__(self) -> None:
        self.passes, self.at = 0, -1

    def __call__(self) -> None:
        self.passes += 1
        if self.passes == self.at:
            raise Stop


@pytest.fixture(scope="module")
def button() -> Button:
    return Button()


@pytest.fixture(scope="module")
def pipeline(button) -> VideoPipeline:
    return load("demo", "auto", Residency(torch.device("cpu"), lambda part, memory: None, button))


@pytest.fixture(autouse=True)
def thresholds(monkeypatch, button):
    """One that skips all after the first step."""
    button.at = -1
    monkeypatch.setitem(space.THRESHOLDS["first_block"], "quick", (1e3,))
    monkeypatch.setattr("vidaccel.nodes.pipeline.tuning.CACHES", ("first_block",))


@pytest.fixture
def tune(pipeline):
    """`tune(pipeline, folder, ...)`, by a clock that nothing else on the machine moves."""
    with layer_clock(pipeline.pipe) as clock:

        def tune(pipeline: VideoPipeline, folder: Path, **changes):
            asked = {
                "bounds": {"min_psnr": 1.0, "max_error": 0.0, "max_time_ratio": 0.0}, "levers": ("cache", "adapter"),
                "effort": "quick", "confirm": 1, "seed": 3, "settings": SIZE, "clock": clock,
            }  # fmt: skip
            with torch.inference_mode():  # as ComfyUI runs nodes
                return tuned(pipeline, changes.pop("prompts", PROMPTS), folder, **(asked | changes))

        yield tune


def test_a_preset_is_found_that_apply_preset_takes(pipeline, tune, tmp_path):
    shown = []
    made = tune(pipeline, tmp_path / "t", show=lambda done, total: shown.append((done, total)))
    assert made.preset.cache == Cache("first_block", 1e3) and made.preset.model == "demo"
    assert load_preset(tmp_path / "t" / "preset.yaml").cache == made.preset.cache
    assert made.text.startswith("first_block 1000: ") and f"page: {tmp_path / 't' / 'tune.html'}" in made.text
    (ratio,) = re.findall(
        r"([\d.]+) times as fast in turns with dense, [\d.]+ dB: first_block 1000 \(chosen\)", made.text
    )
    assert f"first_block 1000: {ratio} times as fast as dense" in made.text
    assert with_preset(pipeline, made.preset).preset is made.preset
    done = [each for each, _ in shown]
    assert done == sorted(done) and done[-1] >= 2 and all(d <= t for d, t in shown if t is not None)


def test_a_prompt_that_is_cut_off_is_told(pipeline, tune, tmp_path):
    made = tune(pipeline, tmp_path / "t", prompts="circle " * 600, levers=("cache",))
    assert 'prompt has 600 tokens, and the text encoder reads the first 511; cut off: "circle circle' in made.text


def test_it_is_stopped_within_a_run_and_goes_on(pipeline, tune, button, tmp_path):
    before = dict(pipeline.pipe.transformer.__dict__)
    start = button.passes
    whole = tune(pipeline, tmp_path / "whole", levers=("cache",))
    passes = button.passes - start
    button.at = button.passes + passes - 9  # while videos are made with the cache
    with pytest.raises(Stop):
        tune(pipeline, tmp_path / "t", levers=("cache",))
    assert (tmp_path / "t" / FILE).is_file() and not (tmp_path / "t" / "preset.yaml").exists()
    assert {k: v for k, v in pipeline.pipe.transformer.__dict__.items() if k[0] != "_"} == {
        k: v for k, v in before.items() if k[0] != "_"
    }
    start = button.passes
    made = tune(pipeline, tmp_path / "t", levers=("cache",))
    assert made.preset.cache == whole.preset.cache and button.passes - start < passes / 2


def test_where_dense_is_the_fastest_the_preset_has_no_lever(pipeline, tune, tmp_path, monkeypatch):
    monkeypatch.setitem(space.THRESHOLDS["first_block"], "quick", (0.0,))  # skips nothing
    made = tune(pipeline, tmp_path / "t", levers=("cache",))
    assert made.preset.levers() == {} and made.text.startswith("No gain here") and "preset:" not in made.text


def test_what_it_refuses(pipeline, tune, tmp_path):
    with_method = pipeline.accelerated(Acceleration())
    for given, changes, message in (
        (pipeline, {"prompts": " \n"}, "prompts is empty: give one a line"),
        (pipeline, {"bounds": {"min_psnr": 0.0, "max_error": 0.0}}, "min_psnr is needed, or another bound"),
        (
            pipeline,
            {"levers": ()},
            "^sparse, caches, adapters, guidance_cache, compiled_blocks are all off. Switch one",
        ),
        (pipeline, {"settings": SIZE | {"frames": 10}}, "frames is 10: this model makes"),
        (pipeline, {"settings": SIZE | {"steps": 1}}, "steps is 1: a run of one step has nothing to tune"),
        (with_method, {}, "pipeline has Accelerate Pipeline before it: connect the one from before"),
        (with_preset(pipeline, Preset(cache=Cache("first_block"))), {}, "pipeline has Apply Preset before it"),
    ):
        with pytest.raises(InputError, match=message):
            tune(given, tmp_path / "t", **changes)
    assert not (tmp_path / "t").exists()
    # Nothing within the budget is an error with the nearest, and the page is there.
    bounds = {"min_psnr": 99.0, "max_error": 0.0, "max_time_ratio": 0.0}
    with pytest.raises(InputError, match=r"Nothing that was tried is .* The nearest is first_block .*tune\.html"):
        tune(pipeline, tmp_path / "t", bounds=bounds)
    assert (tmp_path / "t" / "tune.html").is_file()
    # Another pipeline, other weights, and another size are not mixed with what is there.
    with pytest.raises(InputError, match="^name is .* measurements of something else: size was"):
        tune(pipeline, tmp_path / "t", settings=SIZE | {"frames": 9})
    with pytest.raises(InputError, match='model was "demo" and is "other"'):
        tune(replace(pipeline, facts=replace(pipeline.facts, name="other")), tmp_path / "t")
    weight = pipeline.pipe.transformer.proj_out.weight
    try:
        with torch.no_grad():
            weight.data += 1
        with pytest.raises(InputError, match="measurements of something else: weights was"):
            tune(pipeline, tmp_path / "t")
    finally:
        with torch.no_grad():
            weight.data -= 1


def test_compiled_blocks_are_asked_for_on_the_device_of_the_pipeline(pipeline, tune, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("vidaccel.attention.code_generator.missing", lambda device: asked.append(device) or "is away")
    with pytest.raises(InputError, match=r"leaves nothing to try \(compile: torch's compiler is away\)"):
        tune(pipeline, tmp_path / "t", levers=("compile",))
    assert asked == [pipeline.residency.device]


def test_a_package_that_is_missing(pipeline, tune, tmp_path, monkeypatch):
    monkeypatch.setattr("vidaccel.nodes.pipeline.tuning.PACKAGES", ("nothing-of-the-kind>=1",))
    with pytest.raises(InputError, match=r'^tuning needs nothing-of.* pip install -r .* "nothing-of-the-kind>=1"$'):
        tune(pipeline, tmp_path / "t")


def test_the_folder(tmp_path):
    assert folder_of(" tune/wan ", tmp_path) == tmp_path / "tune" / "wan"
    for name in ("", " ", "/etc", "../x", "a/../../b"):
        with pytest.raises(InputError, match="it must be the name of a folder below ComfyUI's output"):
            folder_of(name, tmp_path)
    for name, message in (
        ("a\0b", r"^name is 'a\\x00b': a folder's name has no null byte. Leave it out."),
        (
            "tune/" + "x" * 300,
            "^name has a part of 300 bytes, xxxx.*: a folder's name has 255 at the most. Shorten it.",
        ),
        ("ä" * 128, "a part of 256 bytes"),
    ):
        with pytest.raises(InputError, match=message):
            folder_of(name, tmp_path)
    assert folder_of("x" * 255, tmp_path).name == "x" * 255
