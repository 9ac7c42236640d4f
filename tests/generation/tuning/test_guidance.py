"""Second passes of guidance left out, as a lever of `tune`; the clock counts layers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from diffusers import WanPipeline
from families.ltx import ltx

import vidaccel
from vidaccel import DenseSchedule, GuidanceCache, Preset, Tangent, demo
from vidaccel.generation.errors import BadInput
from vidaccel.generation.models.inspected import inspect_pipeline
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.tuning.budget import Budget
from vidaccel.generation.tuning.plan import planned
from vidaccel.generation.tuning.trajectory import probe, record
from vidaccel.pipelines.acceleration import families
from vidaccel.pipelines.presets import Cache, load_preset

PROMPTS = demo.HELD_OUT_PROMPTS[:2]
TINY = {"frames": 5, "height": 32, "width": 32, "steps": 6}
EVERY_2 = GuidanceCache(2, first_steps=2)


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- single steps ------------------------------------------------------------------------------------------------------


def test_steps_with_a_pass_for_each_branch(pipe, layers):
    settings = Settings(PROMPTS[0], seed=3, **TINY).checked(inspect_pipeline(pipe))
    trajectory, _ = record(pipe, settings, layers)
    made = probe(pipe, settings, trajectory, Preset(guidance_cache=EVERY_2), range(6), clock=layers)
    assert made.computed == {0: 1.0, 1: 1.0, 2: 0.5, 3: 1.0, 4: 0.5, 5: 1.0} and made.incomplete == [2, 4]
    assert made.seconds == {0: 12.0, 1: 12.0, 2: 6.0, 3: 12.0, 4: 6.0, 5: 12.0}
    passes = [output[0] for output in trajectory.outputs]
    _are_those_of_the_rule(made.errors, passes[::2], passes[1::2])


def test_steps_with_both_branches_in_a_batch():
    pipe = ltx()
    ran = []
    counted = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _module, _args, kwargs: ran.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    size = {"frames": 17, "height": 128, "width": 192, "steps": 6}
    settings = Settings("a dot", seed=3, **size).checked(inspect_pipeline(pipe))

    def samples() -> float:
        return float(sum(ran))

    trajectory, _ = record(pipe, settings, samples)
    hooks = len(pipe.transformer._forward_hooks)
    made = probe(pipe, settings, trajectory, Preset(guidance_cache=EVERY_2), range(6), clock=samples)
    assert made.computed == {0: 1.0, 1: 1.0, 2: 0.5, 3: 1.0, 4: 0.5, 5: 1.0}
    assert made.seconds == {0: 2.0, 1: 2.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 2.0}
    negative, positive = zip(*[output[0].chunk(2) for output in trajectory.outputs], strict=True)
    _are_those_of_the_rule(made.errors, positive, negative)
    # In a batch of one sample as well: only what is left of it is sparse, and off.
    few = Tangent(density=0.4, q_clusters=6, k_clusters=12, schedule=DenseSchedule())
    sparse = probe(pipe, settings, trajectory, Preset(method=few), range(6), clock=samples)
    both = probe(pipe, settings, trajectory, Preset(method=few, guidance_cache=EVERY_2), range(6), clock=samples)
    assert both.errors[2] > made.errors[2] and both.errors[1] == pytest.approx(sparse.errors[1])
    assert len(pipe.transformer._forward_hooks) == hooks and "forward" not in pipe.transformer.__dict__
    counted.remove()


def _are_those_of_the_rule(errors, first, second) -> None:
    """Of steps 2 and 4 what the last two differences say, and 0 of the others."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    for step, wrong in errors.items():
        if step not in (2, 4):
            assert wrong == 0.0
            continue
        before, last = (0, 1) if step == 2 else (1, 3)
        way = 0.5 * (step - last) / (last - before)
        missing = first[step] - differences[last] - way * (differences[last] - differences[before])
        whole = first[step].square().sum() + second[step].square().sum()
        assert wrong == pytest.approx(float((missing - second[step]).norm() / whole.sqrt()), rel=1e-3) and wrong > 0


# -- whole -------------------------------------------------------------------------------------------------------------


def test_a_preset_is_found_and_generate_takes_it(pipe, layers, tmp_path):
    """Of 6 steps of 12 layers, 2, 3 and 5 make one pass."""
    options = {"levers": ("guidance",), "effort": "quick", "progress": False, "clock": layers}
    made = vidaccel.tune(pipe, PROMPTS, 3, out=tmp_path / "t", min_psnr=1.0, **options, **TINY)
    assert made.outcome == "found" and made.chosen.candidate.label == "guidance every 3" and not made.dropped
    own = made.chosen.confirmed
    assert own.dense == (72.0, 72.0) and own.seconds == (54.0, 54.0) and made.gain == (72 / 54,) * 2
    assert (own.computed, own.forwards) == (9, 12) and 0 < own.error < 0.5
    assert made.chosen.predicted.seconds == 54 and made.chosen.predicted.error == pytest.approx(own.error)
    preset = load_preset(tmp_path / "t" / "preset.yaml")
    assert preset.guidance_cache == GuidanceCache(3) and preset.num_inference_steps == 6
    again = vidaccel.generate(pipe, PROMPTS[0], seed=3, preset=preset, progress=False, **TINY)
    assert again.account.counts()["computed"] == 9
    page = (tmp_path / "t" / "tune.html").read_text()
    assert "guidance every 3: 1.33 times as fast as dense" in page and "guidance_cache:" in page
    assert json.loads((tmp_path / "t" / "tune.json").read_text())["tried"][0]["what"] == "guidance every 3"
    # Known from the journal: nothing runs.
    ran = layers()
    again = vidaccel.tune(pipe, PROMPTS, 3, out=tmp_path / "t", min_psnr=1.0, **options, **TINY)
    assert again.to_dict() == made.to_dict() and layers() == ran


def test_beside_a_cache_what_was_predicted_is_what_runs(pipe, layers, tmp_path, monkeypatch):
    """One that skips every other step: of the others, those that guidance says make both passes."""
    monkeypatch.setattr("vidaccel.generation.tuning.api.cache_levers", lambda *_: [Cache("taylorseer", 2)])
    options = {"levers": ("guidance", "cache"), "caches": ("taylorseer",), "effort": "quick", "progress": False}
    size = TINY | {"steps": 10}
    made = vidaccel.tune(
        pipe, PROMPTS[:1], 3, out=tmp_path / "t", min_psnr=1.0, confirm=1, clock=layers, **options, **size
    )
    assert made.chosen.candidate.label == "taylorseer 2; guidance every 3"
    assert made.chosen.confirmed.median == pytest.approx(made.chosen.predicted.seconds, rel=0.02)


def test_with_both_branches_in_a_batch_it_is_not_put_beside_caches(tmp_path):
    options = {"levers": ("guidance", "cache"), "caches": ("first_block",), "effort": "quick", "progress": False}
    size = {"frames": 17, "height": 128, "width": 192, "steps": 6}
    made = vidaccel.tune(ltx(), "a dot", out=tmp_path / "t", min_psnr=1.0, **options, **size)
    assert "LTX-Video has both branches in a batch" in made.dropped["guidance with a cache"]
    labels = [each.candidate.label for each in made.tried]
    assert "guidance every 3" in labels and not [
        label for label in labels if "first_block" in label and "every" in label
    ]


# -- which there are, before weights are read --------------------------------------------------------------------------


def plan(tmp_path, model="demo", **changes):
    placing = {"device": "cpu"} if model == "demo" else {}
    levers = changes.pop("levers", ("guidance", "cache"))
    return planned(
        model, PROMPTS, 0, out=tmp_path / "t", budget=Budget(min_psnr=20), confirm=1, levers=levers, methods=(),
        caches=("first_block",) if "cache" in levers else (), effort="normal", settings=TINY | changes, placing=placing,
    )  # fmt: skip


def test_which_are_tried_and_why_none(tmp_path, monkeypatch, pipe):
    found = plan(tmp_path)
    assert [each.every for each in found.guidance] == [2, 3, 4] and not found.dropped
    assert plan(tmp_path, levers=("cache",)).guidance == ()
    without = plan(tmp_path, guidance_scale=1.0)
    assert without.guidance == () and "guidance_scale must be above 1, and it is 1" in without.dropped["guidance"]
    short = plan(tmp_path, steps=2)
    assert short.guidance == () and short.dropped["guidance"] == "it makes both passes in all 2 steps"
    with pytest.raises(BadInput, match=r"leaves nothing to try \(guidance: no second pass to leave out"):
        plan(tmp_path, levers=("guidance",), guidance_scale=1.0)
    # What a loaded pipeline tells.
    assert plan(tmp_path, pipe).guidance
    with vidaccel.guidance_cache(pipe):
        assert "has a guidance cache already" in plan(tmp_path, pipe).dropped["guidance"]
    three = [
        replace(f, branches=("cond", "uncond", "other")) if "WanPipeline" in f.pipelines else f
        for f in families.FAMILIES
    ]
    monkeypatch.setattr(families, "FAMILIES", tuple(three))
    assert "has other branches than two of guidance" in plan(tmp_path).dropped["guidance"]
