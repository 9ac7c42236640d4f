"""The cache of a preset and others in the same transformer: refused before, told of where they come or go later."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, WanPipeline
from eager_caches import EAGER, RATIOS
from tiny_wan import generate, make_pipe

import vidaccel
from vidaccel import SVG2, Cache, DenseSchedule, Preset
from vidaccel.pipelines.presets import PresetError

WITHIN = FirstBlockCacheConfig(threshold=10.0)  # skips every step but the first
NOTHING = Cache("forecast", 1e-6)  # a threshold that no forecast meets


def sibling(pipe: WanPipeline) -> WanPipeline:
    other = WanPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def dense_first(steps: int) -> Preset:
    return Preset(method=SVG2(top_p=0.5, schedule=DenseSchedule(first_steps=steps)), backend="reference", cache=NOTHING)


def test_what_a_cache_within_a_forecast_leaves_out_is_told_as_skipped(pipe, caplog):
    """The forecast computes each pass, and the other cache leaves out most of it."""
    ran = Counter[str]()
    pipe.transformer.blocks[2].attn1.register_forward_hook(lambda *_: ran.update(["passes"]))
    with vidaccel.apply(pipe, Preset(cache=NOTHING)) as handle:
        generate(pipe, steps=6)
        assert handle.report().counts()["computed"] == ran["passes"] == 12 and "beside" not in str(handle.report())
        ran.clear()
        pipe.transformer.enable_cache(WITHIN)
        generate(pipe, steps=6)
        counts = handle.report().last().counts()
        assert (counts["computed"], counts["skipped"]) == (ran["passes"], 12 - ran["passes"]) == (2, 10)
    (note,) = [note for note in handle.report().notes if "beside the preset's cache" in note]
    assert note.startswith("FirstBlockCacheConfig came into the transformer beside the preset's cache forecast")
    assert note.endswith("call transformer.disable_cache()") and "raise the threshold" not in str(handle.report())
    assert [record.getMessage() for record in caplog.records].count(note) == 1
    assert pipe.transformer.is_cache_enabled  # it is not the preset's


def test_dense_steps_that_it_leaves_out_are_not_told_as_computed(pipe):
    with vidaccel.apply(pipe, dense_first(3)) as handle:
        pipe.transformer.enable_cache(WITHIN)
        generate(pipe, steps=6)
        account = handle.report()
    assert [(s.attention, s.computed) for s in account.steps] == [("dense", 2)] + [("-", 0)] * 5
    assert any("a cache skipped steps that the schedule keeps dense" in note for note in account.notes)


def test_what_a_pipeline_that_shares_the_transformer_cannot_have(pipe):
    """By a preset of its own: the other one's cache would know nothing of it."""
    other = sibling(pipe)
    for name in ("forecast", "first_block"):
        with vidaccel.apply(pipe, Preset(name="one", cache=EAGER[name])):
            wanted = generate(pipe)
            there = f"the transformer has the cache {name} of the preset one already"
            for cache in ("forecast", "first_block", "taylorseer"):
                with pytest.raises(PresetError, match=rf"{there}. Call remove\(\) on its handle, or vidaccel.restore"):
                    vidaccel.apply(other, Preset(cache=EAGER[cache]))
            with pytest.raises(PresetError, match=f"method is svg2: {there}, which skips attention of steps"):
                vidaccel.apply(other, Preset(method=SVG2(schedule=DenseSchedule(first_steps=1)), backend="reference"))
            assert generate(pipe).equal(wanted)
    vidaccel.apply(other, Preset(cache=EAGER["forecast"])).remove()


def test_a_cache_that_was_taken_out_by_hand(pipe, cache, caplog):
    """Whoever calls `disable_cache` has no cache, and the account says so."""
    plain = generate(pipe)
    with vidaccel.apply(pipe, Preset(cache=cache)) as handle:
        generate(pipe)
        assert handle.report().counts()["skipped"] and "taken out" not in str(handle.report())
        if cache.name == "cache_dit":
            import cache_dit

            cache_dit.disable_cache(pipe.transformer)
        else:
            pipe.transformer.disable_cache()
        handle.reset()
        made = generate(pipe)
        counts, report = handle.report().counts(), str(handle.report())
        if cache.name == "forecast":  # which is none of diffusers'
            assert counts["skipped"] and "taken out" not in report
            return
        assert made.equal(plain) and (counts["computed"], counts["skipped"]) == (8, 0)
        assert f"the preset's cache {cache.name} was taken out of the transformer by disable_cache()" in report
        assert "raise the threshold" not in report and "skipped no pass" not in report
    told = [record for record in caplog.records if "was taken out of the transformer" in record.getMessage()]
    assert len(told) == 1 and generate(pipe).equal(plain)


def test_another_in_its_place_stays_when_the_preset_goes(pipe):
    ratios = MagCacheConfig(num_inference_steps=4, mag_ratios=torch.tensor(RATIOS["mag_ratios"]))
    for name in ("first_block", "seacache", "taylorseer"):
        handle = vidaccel.apply(pipe, Preset(cache=EAGER[name]))
        pipe.transformer.disable_cache()
        pipe.transformer.enable_cache(ratios)
        generate(pipe)
        assert "and MagCacheConfig is in its place" in str(handle.report())
        handle.remove()
        assert pipe.transformer._cache_config is ratios and "in its place" in str(handle.report())
        pipe.transformer.disable_cache()


def test_a_transformer_that_is_replaced_under_a_preset(caplog):
    pipe = make_pipe()
    for preset in (Preset(cache=NOTHING), Preset(guidance_cache=2)):
        handle = vidaccel.apply(pipe, preset)
        assert "was replaced" not in str(handle.report())
        pipe.transformer = make_pipe().transformer
        generate(pipe)
        (note,) = handle.report().notes
        assert note.startswith("transformer was replaced after apply, and the new one runs without the preset")
        handle.remove()
        assert handle.report().notes == (note,)
    assert [record.getMessage() for record in caplog.records].count(note) == 2
