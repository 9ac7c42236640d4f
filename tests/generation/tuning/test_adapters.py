"""Adapters as levers of `tune`: those beside demo-dc, found by the hash of its weights; the clock counts layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffusers import AutoencoderKLWan
from gft_adapters import write_adapter
from gft_calls import saved
from tiny_wan import make_transformer

import vidaccel
from vidaccel import DCVideoGenPipeline, demo
from vidaccel.generation.errors import BadInput
from vidaccel.generation.tuning import space
from vidaccel.generation.tuning.budget import Budget
from vidaccel.generation.tuning.plan import planned
from vidaccel.pipelines.presets import load_preset

PROMPTS = demo.HELD_OUT_PROMPTS[:1]
SMALL = {"frames": 4, "height": 32, "width": 32, "steps": 6, "guidance_scale": 2.0}
ADAPTERS = Path(demo.path("demo-dc"), "transformer")
ALONE = {"levers": ("adapter",), "progress": False}


@pytest.fixture(scope="module")
def pipe() -> DCVideoGenPipeline:
    pipe = DCVideoGenPipeline.from_pretrained(demo.path("demo-dc"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_adapters_beside_the_model_are_found_and_the_fastest_is_taken(pipe, layers, tmp_path):
    """6 steps of two passes are 72 layers, one pass is 36, 4 steps of one pass 24."""
    made = vidaccel.tune(pipe, PROMPTS, 3, out=tmp_path / "t", min_psnr=1.0, clock=layers, **ALONE, **SMALL)
    assert made.outcome == "found" and made.dense_seconds == 72 and made.gain == (3.0,)
    assert made.chosen.candidate.label == "few_steps_4 (4 steps, one pass)"
    seconds = {each.candidate.label: each.confirmed.median for each in made.confirmed}
    assert seconds == {"few_steps_4 (4 steps, one pass)": 24, "guidance_free (one pass)": 36}
    assert made.chosen.confirmed.error is None and made.in_words().endswith("dB to it.")
    preset = load_preset(tmp_path / "t" / "preset.yaml")
    assert preset.guidance_free == (str(ADAPTERS / "few_steps_4.safetensors"),)
    assert preset.num_inference_steps == 4 and preset.guidance_scale == 2.0 and "error_a_step" not in preset.measured
    ran = layers()
    with vidaccel.apply(pipe, preset) as handle:
        pipe(PROMPTS[0], num_frames=4, height=32, width=32, output_type="latent", **handle.arguments)
    assert layers() - ran == 24
    # Known from the journal: nothing runs.
    ran = layers()
    again = vidaccel.tune(pipe, PROMPTS, 3, out=tmp_path / "t", min_psnr=1.0, clock=layers, **ALONE, **SMALL)
    assert again.to_dict() == made.to_dict() and layers() == ran


def test_other_levers_are_measured_on_the_run_of_an_adapter(pipe, layers, tmp_path, monkeypatch):
    monkeypatch.setitem(space.THRESHOLDS["first_block"], "quick", (1e3,))
    options = {"levers": ("adapter", "cache"), "caches": ("first_block",), "effort": "quick", "progress": False}
    file = ADAPTERS / "guidance_free.safetensors"
    made = vidaccel.tune(
        pipe, PROMPTS, out=tmp_path / "t", min_psnr=1.0, adapters=[file], clock=layers, **options, **SMALL
    )
    assert made.outcome == "found" and made.chosen.candidate.label == "guidance_free (one pass); first_block 1000"
    own = made.chosen.confirmed
    assert (own.computed, own.forwards) == (1, 6) and own.median == 6 + 5  # a skipped pass is one layer
    # Predicted to the second from its own run, and nearer to dense than its parts' errors alone could tell.
    assert made.chosen.predicted.seconds == 11
    preset = load_preset(tmp_path / "t" / "preset.yaml")
    # The model's own by that word, though it was given as a file: so it is found wherever the model is.
    assert preset.cache.name == "first_block" and preset.guidance_free == ("own",)
    assert preset.num_inference_steps == 6 and preset.transformer["in_channels"] == 32


def test_an_adapter_that_misses_the_quality_is_not_combined(pipe, layers, tmp_path, monkeypatch):
    monkeypatch.setitem(space.THRESHOLDS["first_block"], "quick", (1e3,))
    options = {"levers": ("adapter", "cache"), "caches": ("first_block",), "effort": "quick", "progress": False}
    made = vidaccel.tune(pipe, PROMPTS, out=tmp_path / "t", min_psnr=99.0, clock=layers, **options, **SMALL)
    assert made.outcome == "nothing within the budget"
    labels = {each.candidate.label for each in made.tried}
    assert labels == {"few_steps_4 (4 steps, one pass)", "guidance_free (one pass)", "first_block 1000"}


# -- which there are, before weights are read --------------------------------------------------------------------------


def plan(model="demo-dc", tmp_path=None, settings=None, budget=None, **changes):
    asked = {"levers": ("cache", "adapter"), "methods": (), "caches": ("first_block",), "effort": "quick"} | changes
    return planned(
        str(model), PROMPTS, 0, out=tmp_path / "t", budget=budget or Budget(min_psnr=20), confirm=1,
        settings=SMALL | (settings or {}), placing={"device": "cpu"}, **asked,
    )  # fmt: skip


def test_which_are_tried_and_which_are_dropped(tmp_path):
    found = plan(tmp_path=tmp_path)
    assert [adapter.name for adapter in found.adapters] == ["few_steps_4", "guidance_free"] and not found.dropped
    assert [adapter.name for adapter in plan("demo", tmp_path, {"frames": 9}).adapters] == ["guidance_free"]
    # One was trained at a guidance of 2 alone, and a model without guidance has none to put into one pass.
    other = plan(tmp_path=tmp_path, settings={"guidance_scale": 3.0})
    assert [adapter.name for adapter in other.adapters] == ["guidance_free"]
    assert (
        "guidance_scale is 3.0: few_steps_4.safetensors was trained up to 2" in other.dropped["few_steps_4.safetensors"]
    )
    assert plan(tmp_path=tmp_path, settings={"guidance_scale": 1.0}).adapters == ()
    # The error of a step is of the same passes.
    by_error = plan(tmp_path=tmp_path, budget=Budget(max_error=0.1))
    assert not by_error.adapters and all("no error" in why for why in by_error.dropped.values())


def test_an_adapter_of_other_weights_is_dropped_beside_them_and_refused_where_it_is_given(tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(demo.path("demo-dc"), folder)
    stated = json.loads((folder / "adapter.json").read_text())
    stated["transformer"]["eps"] = 2e-6
    (folder / "adapter.json").write_text(json.dumps(stated))
    found = plan(folder, tmp_path)
    assert not found.adapters and set(found.dropped) == {"few_steps_4.safetensors", "guidance_free.safetensors"}
    assert "was trained on demo-dc (transformer), and this model is another" in found.dropped["few_steps_4.safetensors"]
    with pytest.raises(
        BadInput, match=r"^adapters guidance_free\.safetensors was trained on .* Give an adapter of this"
    ):
        plan(folder, tmp_path, adapters=[ADAPTERS / "guidance_free.safetensors"])


def test_two_transformers_have_one_each_for_the_same_steps(tmp_path):
    vae = AutoencoderKLWan.from_pretrained(demo.path(), subfolder="vae")
    folder = saved(tmp_path / "two", transformer_2=make_transformer(1), boundary_ratio=0.9, vae=vae)
    size = {"frames": 9, "guidance_scale": 3.0, "negative_prompt": ""}
    parts = {name: make_transformer(seed) for seed, name in enumerate(("transformer", "transformer_2"))}
    few = {"recipe": "consistency", "few_steps": {"sigmas": [1.0, 0.5]}}
    beside = [write_adapter(folder / part, folder, transformer, part) for part, transformer in parts.items()]
    alone = write_adapter(tmp_path, folder, parts["transformer"], **few)
    found = plan(folder, tmp_path, size)
    assert [each.places for each in found.adapters] == [tuple(map(str, beside))] and not found.dropped
    assert found.adapters[0].in_preset == found.adapters[0].places
    with pytest.raises(BadInput, match="^adapters transformer.safetensors: the model has transformer and"):
        plan(folder, tmp_path, size, adapters=[*beside, alone])
    alone.rename(folder / "transformer" / "few.safetensors")
    found = plan(folder, tmp_path, size)
    assert len(found.adapters) == 1 and "each needs one for the same steps" in found.dropped["few.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": ["nowhere"]}, r"^adapters cannot be used: .*nowhere"),
        (
            {"adapters": [ADAPTERS], "levers": ("cache",)},
            "^adapters given without the lever adapter, which",
        ),
        (
            {"adapters": [ADAPTERS / "guidance_free.safetensors"], "budget": Budget(max_error=0.1)},
            r"^max_error is no budget for adapters: an adapter makes .* Give min_psnr or max_time_ratio, or leave",
        ),
        (
            {"adapters": [ADAPTERS / "guidance_free.safetensors"], "settings": {"guidance_scale": 1.0}},
            r"^guidance_scale is 1\.0: there is no guidance .* Raise it, or leave adapters out",
        ),
        (
            {"adapters": [ADAPTERS / "few_steps_4.safetensors"], "settings": {"guidance_scale": 4.0}},
            r"^guidance_scale is 4\.0: few_steps_4\.safetensors was trained up to 2",
        ),
    ],
)
def test_bad_input(tmp_path, changes, message):
    with pytest.raises(BadInput, match=message):
        plan(tmp_path=tmp_path, **changes)
    assert not (tmp_path / "t").exists()
