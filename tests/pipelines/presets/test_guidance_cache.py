"""The lever `guidance_cache` of presets."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig
from families.cogvideo import cogvideox_5b
from families.ltx import ltx
from families.others import mochi
from tiny_wan import generate, make_pipe

import vidaccel
from vidaccel import DenseSchedule, GuidanceCache, Preset, Tangent
from vidaccel.pipelines.guidance_cache.differences import left_out
from vidaccel.pipelines.hooks.undo import PRESET
from vidaccel.pipelines.presets import Cache, PresetError, load_preset, save_preset

EVERY_2 = GuidanceCache(2, first_steps=2)
FEW = Tangent(density=0.4, q_clusters=6, k_clusters=12, schedule=DenseSchedule())
RATIOS = {"mag_ratios": [1.0, 0.97, 0.95, 0.97, 0.99, 0.95, 0.9, 0.9]}
CACHES = (
    Cache("forecast", 1e3),
    Cache("first_block", 0.08),
    Cache("magcache", 0.03, RATIOS),
    Cache("seacache", 0.3),
    Cache("taylorseer", 3),
)


def test_it_is_kept_in_files(tmp_path):
    preset = Preset(name="a", guidance_cache=GuidanceCache(4, first_steps=0.1, extrapolation=0.25))
    assert preset.levers() == {"guidance_cache": "one second pass in 4"}
    assert load_preset(save_preset(preset, tmp_path / "a.yaml")) == preset
    for text in ("guidance_cache: 2\n", "guidance_cache: {every: 2}\n"):
        (tmp_path / "b.yaml").write_text(f"version: 1\nname: b\n{text}")
        assert load_preset(tmp_path / "b.yaml").guidance_cache == GuidanceCache(2)


def test_the_account_tells_what_was_left_out():
    pipe = make_pipe()
    plain = generate(pipe, steps=8)
    with vidaccel.apply(pipe, Preset(guidance_cache=EVERY_2)) as handle:
        first = generate(pipe, steps=8)
        told = handle.report()
        handle.reset()
        assert generate(pipe, steps=8).equal(first) and handle.report().counts() == told.counts()
    assert told.counts() == {"steps": 8, "forwards": 16, "computed": 13, "skipped": 3} | {
        "dense": 0,
        "sparse": 0,
        "mixed": 0,
        "halved": 0,
    }
    assert [step.computed for step in told.steps] == [2, 2, 1, 2, 1, 2, 1, 2]
    assert told.notes == ("guidance cache: the transformer made 5 of 8 second passes of guidance",)
    assert generate(pipe, steps=8).equal(plain) and not first.equal(plain)


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
def test_a_cache_that_comes_after_it_is_inside_or_refused(cache):
    pipe = make_pipe()
    with vidaccel.guidance_cache(pipe, EVERY_2):
        if cache.name in ("forecast", "seacache"):
            with pytest.raises(PresetError, match=f"cache is {cache.name}: the transformer has a guidance cache"):
                vidaccel.apply(pipe, Preset(cache=cache))
        else:
            with vidaccel.apply(pipe, Preset(cache=cache)) as handle:
                generate(pipe, steps=8)
                assert handle.report().counts()["skipped"] > 3
        assert not hasattr(pipe, PRESET)
    vidaccel.apply(pipe, Preset(cache=cache)).remove()


def test_a_cache_that_comes_after_one_in_a_batch_is_refused():
    pipe = cogvideox_5b()
    with vidaccel.guidance_cache(pipe, EVERY_2), pytest.raises(PresetError, match="taylorseer compares batches"):
        vidaccel.apply(pipe, Preset(cache=CACHES[-1]))
    with vidaccel.apply(pipe, Preset(cache=CACHES[-1])), pytest.raises(RuntimeError, match="compares batches"):
        vidaccel.guidance_cache(pipe, EVERY_2)
    pipe.transformer.enable_cache(PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500))
    with pytest.raises(RuntimeError, match="compares batches"):
        vidaccel.guidance_cache(pipe, EVERY_2)
    pipe.transformer.disable_cache()
    other = mochi()
    with vidaccel.apply(other, Preset(cache=CACHES[0])), pytest.raises(RuntimeError, match="batches"):
        vidaccel.guidance_cache(other, EVERY_2)


@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
def test_beside_a_cache(cache, caplog):
    pipe = make_pipe()
    plain = generate(pipe, steps=8)
    with vidaccel.apply(pipe, Preset(cache=cache)) as handle:
        alone = generate(pipe, steps=8)
        skipped = handle.report().counts()["skipped"]
    with vidaccel.apply(pipe, Preset(cache=cache, guidance_cache=EVERY_2)) as handle:
        both = generate(pipe, steps=8)
        account, passes = handle.report(), [*handle._watches[0].passes]
        assert generate(pipe, steps=8).equal(both)
        with pytest.raises(TypeError, match="before copying"):
            copy.deepcopy(pipe)
    assert account.counts()["skipped"] >= skipped > 0
    assert any("second passes of guidance" in note for note in account.notes)
    seconds = [p for p in passes if p.branch == "uncond" and not p.skipped]
    firsts = {p.step for p in passes if p.branch == "cond" and not p.skipped}
    assert all(p.step in firsts for p in seconds) and len(seconds) < len(firsts)
    told = tuple(p.extrapolated for p in passes if p.branch == "uncond")
    assert left_out(EVERY_2, [step in firsts for step in range(8)]) == told
    assert both.isfinite().all() and not both.equal(alone)
    assert (both - plain).norm() < 2 * max((alone - plain).norm(), plain.norm() / 10)
    assert generate(pipe, steps=8).equal(plain)
    assert "non-adjacent" not in caplog.text


@pytest.mark.parametrize("cache", [None, Cache("forecast", 0.3)])
def test_steps_that_stay_dense_make_both_passes(cache):
    """As of every other cache; behind them it goes on from theirs."""
    pipe = make_pipe()
    schedule = DenseSchedule(first_steps=4, last_steps=2)
    preset = Preset(
        method=replace(FEW, schedule=schedule),
        cache=cache,
        guidance_cache=GuidanceCache(3, first_steps=2),
    )
    with vidaccel.apply(pipe, preset) as handle:
        generate(pipe, steps=8)
        account, passes = handle.report(), [*handle._watches[0].passes]
    assert [s.computed for s in account.steps if s.step in (0, 1, 2, 3, 6, 7)] == [2] * 6
    told = tuple(p.extrapolated for p in passes if p.branch == "uncond")
    assert told == left_out(preset.guidance_cache, [True] * 8, schedule) == (False,) * 4 + (True,) * 2 + (False,) * 2
    assert not any("keeps dense" in note for note in account.notes)
    with vidaccel.apply(pipe, preset.replace(method=replace(FEW, schedule=DenseSchedule(first_steps=8)))) as handle:
        generate(pipe, steps=8)
        notes = handle.report().notes
    assert any("made both passes of guidance" in note and note.endswith("fewer of them dense") for note in notes)


def test_a_reset_between_the_passes_of_a_step_changes_nothing():
    pipe = make_pipe()
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e3), guidance_cache=EVERY_2)) as handle:
        made = generate(pipe, steps=8)
        context = pipe.transformer.cache_context

        def resetting(name, **more):
            if name == "uncond":
                handle.reset()
            return context(name, **more)

        pipe.transformer.cache_context = resetting
        assert generate(pipe, steps=8).equal(made)
        assert handle.report().counts()["forwards"] == 1


def test_a_cache_that_skips_nothing_is_told_of_all_the_same():
    pipe = make_pipe()
    with vidaccel.apply(pipe, Preset(cache=Cache("first_block", 1e-9), guidance_cache=EVERY_2)) as handle:
        generate(pipe, steps=8)
        assert any("skipped no pass" in note for note in handle.report().notes)


def test_halves_of_a_batch_that_are_left_out_are_told():
    """All passes are computed then, with half as much in some."""
    pipe = ltx()
    pipe.set_progress_bar_config(disable=True)
    with vidaccel.apply(pipe, Preset(guidance_cache=EVERY_2)) as handle:
        pipe("a", num_frames=9, height=64, width=64, num_inference_steps=6, guidance_scale=3.0, output_type="latent")
        account = handle.report()
    assert [step.halved for step in account.steps] == [0, 0, 1, 0, 1, 0]
    counts = account.counts()
    assert (counts["computed"], counts["skipped"], counts["halved"]) == (6, 0, 2)
    assert account.in_words().endswith("2 of those computed with one branch of guidance instead of two")
    assert "skipped halved" in str(account) and account.to_dict()["steps"][2]["halved"] == 1


def test_beside_sparse_attention_with_both_branches_in_a_batch():
    pipe = ltx()

    def run():
        size = {"height": 128, "width": 192, "num_frames": 17, "num_inference_steps": 6}
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt="a dot", **size, generator=generator, output_type="latent").frames

    plain = run()
    with vidaccel.apply(pipe, Preset(method=FEW)):
        sparse = run()
    with vidaccel.apply(pipe, Preset(method=FEW, guidance_cache=EVERY_2)) as handle:
        both = run()
        account = handle.report()
    assert [step.attention for step in account.steps] == ["sparse"] * 6
    assert any("made 4 of 6" in note for note in account.notes)
    assert (both - sparse).norm() < (sparse - plain).norm() + plain.norm() / 10 and run().equal(plain)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"guidance_cache": 1}, "every is 1"),
        ({"guidance_cache": {"each": 2}}, "there is no each"),
        ({"guidance_cache": "often"}, "every is 'often'"),
        ({"guidance_cache": 2, "guidance_free": "own"}, "makes one pass a step"),
        ({"guidance_cache": 2, "guidance_scale": 1.0}, "guidance_scale 1 is without guidance"),
        ({"guidance_cache": 2, "num_inference_steps": 2}, "both passes in all 2 steps"),
    ],
)
def test_what_cannot_be(fields, words):
    with pytest.raises(PresetError, match=words):
        Preset(**fields)


def test_what_cannot_be_in_a_pipeline():
    with pytest.raises(PresetError, match=r"guidance_cache: CogVideoX has both branches in a batch.*first_block"):
        vidaccel.apply(cogvideox_5b(), Preset(guidance_cache=2, cache=Cache("first_block")))
    pipe = make_pipe()
    with vidaccel.guidance_cache(pipe), pytest.raises(PresetError, match="has a guidance cache already"):
        vidaccel.apply(pipe, Preset(guidance_cache=2))
    with vidaccel.apply(pipe, Preset(guidance_cache=2)):
        pass
