"""The guidance cache with ComfyUI's own models in this process.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gft_adapters import write_native
from native_comfyui import comfy, conditioning, defaults, models, patched, sample, tiny, windowed

from vidaccel import GuidanceCache
from vidaccel.nodes.native.forecast import cache_steps
from vidaccel.nodes.native.guidance import guide
from vidaccel.nodes.native.guidance_cache import _Cached, cache_guidance, guidance_log, mixes_prompts
from vidaccel.nodes.report.tables import report_text
from vidaccel.nodes.report.wording import InputError
from vidaccel.pipelines.forecast.settings import ForecastSettings
from vidaccel.pipelines.guidance_cache.differences import Differences

EVERY_2 = GuidanceCache(2, first_steps=0)


def conditions(model) -> list[list[int]]:
    """Which conditions each forward pass from now on computes, 0 the positive one, in a clone's wrapper."""
    from comfy.patcher_extension import WrappersMP

    seen: list[list[int]] = []

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **more):
        seen.append(list((transformer_options or {})["cond_or_uncond"]))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **more)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", wrapper)
    return seen


def by_hand(model):
    """A clone that makes all passes, and puts what the rule says in the place of the negative ones of step 2 of 4."""
    seen: list[torch.Tensor] = []

    def replaced(args):
        (positive, negative), sigma = args["conds_out"], float(args["sigma"].flatten()[0])
        seen.append((positive - negative) / sigma)
        if len(seen) == 3:
            negative = positive - sigma * (seen[1] + 0.5 * (seen[1] - seen[0]))
        return [positive, negative]

    clone = model.clone()
    clone.set_model_sampler_pre_cfg_function(replaced, disable_cfg1_optimization=True)
    return clone


@pytest.mark.parametrize("name", models())
def test_what_stands_for_the_negative_pass(name, caplog):
    description, model, unpatched = tiny(name)
    if description.cfg == 1:
        pytest.skip("it is sampled without guidance")
    wanted = sample(by_hand(model), description)
    clone = cache_guidance(model, EVERY_2)
    seen = conditions(clone)
    with caplog.at_level(logging.INFO, "vidaccel.nodes.native.guidance_cache"):
        made = sample(clone, description)
    assert sum(kinds.count(1) for kinds in seen) == 3 and sum(kinds.count(0) for kinds in seen) == 4
    assert "Guidance Cache: 3 of 4 passes of the negative prompt were made." in caplog.text
    torch.testing.assert_close(made, wanted, atol=1e-3, rtol=1e-3)
    assert not made.equal(unpatched)
    assert sample(clone, description).equal(made) and sample(model, description).equal(unpatched)


def test_without_guidance_nothing_changes(caplog):
    description, model, _ = tiny("wan_t2v")
    plain = replace(description, cfg=1.0)
    with caplog.at_level(logging.INFO, "vidaccel.nodes.native.guidance_cache"):
        assert sample(cache_guidance(model, EVERY_2), plain).equal(sample(model, plain))
    assert not caplog.text


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guidance_within_attention_has_both_prompts_in_all_steps(cfg, caplog):
    """NAG acts where both lie in one batch, with a cfg of 1, too, and did nothing where one was left out."""
    nag = pytest.importorskip("comfy_extras.nodes_nag")
    description, model, _ = tiny("hunyuan")
    description = replace(description, cfg=cfg)
    guided = nag.NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0]
    wanted = sample(guided, description, steps=6)
    assert not wanted.equal(sample(model, description, steps=6))
    assert sample(cache_guidance(guided, EVERY_2), description, steps=6).equal(wanted)
    assert "all 6 passes of the negative prompt were made: another node changes attention where both" in caplog.text


@pytest.mark.parametrize("name", models())
def test_a_patch_of_what_attention_gives_counts_where_the_model_calls_it(name):
    description, model, _ = tiny(name)
    called = []
    patched_model = model.clone()
    patched_model.set_model_attn1_output_patch(lambda out, options: (called.append(1), out)[1])
    sample(patched_model, description, steps=1)
    assert mixes_prompts(model.model, patched_model.model_options) == bool(called)


def test_guidance_within_attention_that_a_model_does_not_have_leaves_the_cache_at_work(caplog):
    nag = pytest.importorskip("comfy_extras.nodes_nag")
    description, model, _ = tiny("wan_t2v")
    guided = nag.NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0]
    assert sample(guided, description).equal(sample(model, description))
    with caplog.at_level(logging.INFO, "vidaccel.nodes.native.guidance_cache"):
        sample(cache_guidance(guided, EVERY_2), description)
    assert "3 of 4 passes of the negative prompt were made." in caplog.text


def test_patches_that_need_no_second_prompt_leave_the_cache_at_work():
    """InfiniteTalk's, also beside samplers that ask for both passes with any cfg (`euler_cfg_pp`)."""
    _, model, _ = tiny("hunyuan")
    audio = {"transformer_options": {"patches": {"attn2_patch": [print], "double_block": [print]}}}
    assert not mixes_prompts(model.model, {**audio, "disable_cfg1_optimization": True})
    unknown = SimpleNamespace(diffusion_model=torch.nn.Identity())
    output = {"transformer_options": {"patches": {"attn1_output_patch": [print]}}}
    assert mixes_prompts(model.model, output) and mixes_prompts(unknown, output)


def guiders() -> dict:
    """Guiders of ComfyUI that do not ask for two passes in one call, by a name: `(MODEL, positive, negative)`."""
    import comfy_extras.nodes_custom_sampler as custom
    from comfy_extras.nodes_perpneg import PerpNegGuider
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple

    found = {
        "DualCFGGuider": lambda m, p, n: custom.DualCFGGuider.execute(m, p, p, n, 4.0, 3.0, "regular"),
        "PerpNegGuider": lambda m, p, n: PerpNegGuider.execute(m, p, n, n, 4.0, 1.0),
        "SkipLayerGuidanceDiTSimple": lambda m, p, n: custom.CFGGuider.execute(
            SkipLayerGuidanceDiTSimple.execute(m, 0.0, 1.0, "1", "").args[0], p, n, 4.0
        ),
    }
    if hasattr(custom, "DualModelGuider"):
        found["DualModelGuider"] = lambda m, p, n: custom.DualModelGuider.execute(m, p, 4.0, m, n)
    return found


@pytest.mark.parametrize("name", guiders())
def test_guiders_that_ask_for_passes_apart_are_told(name):
    description, model, _ = tiny("wan_t2v")
    log = guidance_log()
    positive, negative = (conditioning(description, seed, {}) for seed in (1, 2))
    guider = guiders()[name](cache_guidance(model, EVERY_2, log), positive, negative).args[0]
    sampling = model.get_model_object("model_sampling")
    noise = torch.zeros(1, 16, *description.latent)
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 4)
        guider.sample(noise, noise, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0)
    assert "the guider or another node asks for its passes apart" in report_text(log.news())


def test_guidance_beside_a_cfg_of_1_is_none_of_another_guider():
    """SkipLayerGuidanceDiT makes a further pass of the positive prompt."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    description, model, _ = tiny("wan_t2v")
    log = guidance_log()
    skipping = SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 0.6, "1", "", 0.0).args[0]
    sample(cache_guidance(skipping, EVERY_2, log), replace(description, cfg=1.0))
    assert "with a cfg of 1 there is none" in report_text(log.news())


@pytest.mark.parametrize("first", ["sparse", "cache"])
def test_with_sparse_attention_in_either_order(first):
    description, model, _ = tiny("wan_t2v")
    made = cache_guidance(model, EVERY_2) if first == "cache" else model
    made, session = patched(made)
    made = made if first == "cache" else cache_guidance(made, EVERY_2)
    sample(made, description)
    records = session.report().records
    steps = {branch: {r.step for r in records if r.branch == branch} for branch in ("cond", "uncond")}
    assert steps == {"cond": {0, 1, 2, 3}, "uncond": {0, 1, 3}}


def test_the_node():
    from vidaccel.nodes.guidance_cache_node import NODES, VidaccelGuidanceCache

    description, model, unpatched = tiny("wan_t2v")
    clone, report = VidaccelGuidanceCache.execute(model, **defaults(VidaccelGuidanceCache)).result
    assert report_text(report.news()).startswith("The model was not sampled")
    assert clone is not model and not sample(clone, description).equal(unpatched)
    assert report_text(report.news()) == "Note: Guidance Cache: 2 of 4 passes of the negative prompt were made."
    sample(clone, replace(description, cfg=1.0))
    assert "with a cfg of 1 there is none" in report_text(report.news())
    assert [VidaccelGuidanceCache] == NODES


def test_all_passes_made_is_told(caplog):
    description, model, unpatched = tiny("wan_t2v")
    assert sample(cache_guidance(model, GuidanceCache(first_steps=1.0)), description).equal(unpatched)
    assert "all 4 passes of the negative prompt were made" in caplog.text


def test_what_it_refuses(tmp_path):
    _, model, _ = tiny("wan_t2v")
    with pytest.raises(InputError, match="has a guidance cache already"):
        cache_guidance(cache_guidance(model, EVERY_2), EVERY_2)
    with pytest.raises(InputError, match="guidance-free"):
        cache_guidance(guide(model, write_native(tmp_path), 4.0), EVERY_2)
    with pytest.raises(InputError, match="has a guidance cache, which leaves out passes"):
        guide(cache_guidance(model, EVERY_2), write_native(tmp_path), 4.0)


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
def test_a_cache_of_comfyui_is_refused_in_either_order(kind):
    """What EasyCache gives for a pass would be taken for what the model made."""
    from comfy_extras import nodes_easycache

    description, model, _ = tiny("wan_t2v")

    def theirs(model):
        settings = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
        return getattr(nodes_easycache, f"{kind}Node").execute(model, **settings).args[0]

    for ours in (lambda model: cache_guidance(model, EVERY_2), lambda model: cache_steps(model, ForecastSettings())):
        with pytest.raises(InputError, match=f"cache and {kind}, and what one of the two gives"):
            ours(theirs(model))
        with pytest.raises(InputError, match=f"cache and {kind}, and what one of the two gives"):
            sample(theirs(ours(model)), description)


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_windows_that_move_have_nothing_to_go_on(schedule, monkeypatch):
    """A window that comes again much later would go on from differences of other noise levels."""
    description, model, _ = tiny("wan_t2v")
    kept, ages, enter, second = [], [], _Cached._enter, Differences.second

    def entering(cache, *args):
        enter(cache, *args)
        kept.append(len(cache._kept))

    def going_on(differences, step, first):
        (before, _), (last, _) = differences._kept
        ages.append((step.step - last, last - before))
        return second(differences, step, first)

    monkeypatch.setattr(_Cached, "_enter", entering)
    monkeypatch.setattr(Differences, "second", going_on)
    clone = cache_guidance(windowed(model, schedule, 5, 2), GuidanceCache(4, first_steps=0))
    seen = conditions(clone)
    sample(clone, description, latent=(15, *description.latent[1:]), steps=10)
    windows = sum(kinds.count(0) for kinds in seen) / 10
    made = sum(kinds.count(1) for kinds in seen) / windows
    assert max(kept) <= 2 * windows + 1
    assert all(old < 4 and apart <= 4 for old, apart in ages)
    assert made == 4 if schedule == "standard_static" else made > 6


def test_windows_that_all_move_are_told(caplog):
    """A window that is another one in each step."""

    def sampling(differing: bool) -> None:
        cache = _Cached(GuidanceCache(2, first_steps=0), guidance_log())
        cache.begin()
        for step, sigma in enumerate((1.0, 0.75, 0.5, 0.25)):
            window = SimpleNamespace(index_list=[step * differing, step * differing + 1])
            options = {"sample_sigmas": torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), "context_window": window}
            x = torch.zeros(1, 1, 2, 1, 1)
            both = [[{"uuid": "a"}], [{"uuid": "b"}]]
            cache.conditions(
                lambda *args: [torch.zeros(1, 1, 2, 1, 1)] * 2,
                None, both, x, torch.tensor([sigma]), {"transformer_options": options},
            )  # fmt: skip
        cache.finish()
        cache.end()

    with caplog.at_level(logging.INFO, "vidaccel.nodes.native.guidance_cache"):
        sampling(False)
        assert "3 of 4 passes" in caplog.text
        sampling(True)
    assert "all 4 passes of the negative prompt were made: context windows moved from step to step" in caplog.text


def test_a_prompt_for_a_part_of_the_steps():
    """The difference to the prompt of the steps before says nothing of the next prompt."""
    from comfy_models import comfy, conditioning, empty_latent

    description, model, _ = tiny("wan_t2v")
    clone = cache_guidance(model, GuidanceCache(5, first_steps=0))
    seen = conditions(clone)
    empty = empty_latent(description, description.latent, 1)
    first, second, negative = (conditioning(description, seed, {}) for seed in (1, 3, 2))
    first[0][1] |= {"start_percent": 0.0, "end_percent": 0.5}
    second[0][1] |= {"start_percent": 0.5, "end_percent": 1.0}
    with torch.inference_mode():
        comfy.sample.sample(
            clone, comfy.sample.prepare_noise(empty, 0), 8, 3.0, "euler", "simple", first + second, negative, empty,
            seed=0, disable_pbar=True,
        )  # fmt: skip
    steps = [sorted(kind for kinds in seen for kind in kinds)].pop()
    assert steps.count(1) >= 4  # two at the start, and two again once the prompt is another


@pytest.mark.parametrize("last", [1, 4])
def test_an_interruption_is_no_reason_for_advice(last, caplog):
    """Of five steps, the last one among them."""
    from comfy_models import comfy

    description, model, _ = tiny("wan_t2v")
    for ours in (cache_guidance(model, GuidanceCache(2, first_steps=5)), cache_steps(model, ForecastSettings(1e-9))):

        def stop(step, *args):
            if step == last:
                raise comfy.model_management.InterruptProcessingException

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(ours, description, steps=5, callback=stop)
    assert "make more steps" not in caplog.text
