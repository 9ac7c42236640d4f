"""The forecast cache with ComfyUI's own models in this process.

Set `COMFYUI_PATH` to a checkout of ComfyUI whose requirements are installed, to run these.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch
from native_comfyui import defaults, models, patched, sample, tiny, windowed

from vidaccel import GuidanceCache
from vidaccel.nodes.native.forecast import WINDOWS, _Cached, cache_steps, forecast_log
from vidaccel.nodes.native.guidance_cache import cache_guidance
from vidaccel.nodes.report.tables import report_text
from vidaccel.nodes.report.wording import InputError
from vidaccel.pipelines.forecast.settings import ForecastSettings

LOG = "vidaccel.nodes.native.forecast"
ANYTHING = ForecastSettings(1e6, most=0)
STEPS = 8


def passes(model) -> list[int]:
    """The samples of each forward pass from now on, in a clone's wrapper."""
    from comfy.patcher_extension import WrappersMP

    seen: list[int] = []

    def wrapper(executor, x, *args, **kwargs):
        seen.append(x.shape[0])
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", wrapper)
    return seen


def steady(model):
    """A clone that takes the same numbers off the latents for each part of the noise: all of the way is a line."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()

    def wrapper(executor, model, conds, x, timestep, options, *more):
        out = executor(model, conds, x, timestep, options, *more)
        numbers = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        return [x - timestep.reshape(-1, *[1] * (x.ndim - 1)) * numbers for _ in out]

    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "steady", wrapper)
    return clone


def passes_of(model, description, sampler: str = "euler") -> int:
    clone = model.clone()
    seen = passes(clone)
    sample(clone, description, steps=STEPS, sampler=sampler)
    return len(seen)


@pytest.mark.parametrize("name", models())
def test_a_steady_model_is_forecast_exactly(name, caplog):
    description, model, _ = tiny(name)
    wanted = sample(steady(model), description, steps=STEPS)
    clone = steady(cache_steps(model, ForecastSettings(1e-2, most=0)))  # what is put on later is further inside
    seen = passes(clone)
    with caplog.at_level(logging.INFO, LOG):
        made = sample(clone, description, steps=STEPS)
    assert f"4 of {STEPS} steps were left out" in caplog.text
    assert 2 * len(seen) == passes_of(model, description)
    torch.testing.assert_close(made, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", models())
def test_whatever_is_forecast_the_model_stays_as_it_is(name):
    description, model, unpatched = tiny(name)
    clone = cache_steps(model, ANYTHING)
    made = sample(clone, description, steps=STEPS)
    plain = sample(model, description, steps=STEPS)
    assert made.isfinite().all() and not made.equal(plain)
    assert sample(clone, description, steps=STEPS).equal(made) and sample(model, description).equal(unpatched)


def test_nothing_within_the_tolerance_is_told_with_what_would_be(caplog):
    description, model, unpatched = tiny("wan_t2v")
    assert sample(cache_steps(model, ForecastSettings(0.001)), description, steps=STEPS).equal(
        sample(model, description, steps=STEPS)
    )
    assert "all 8 steps were computed; the best forecast is estimated to be off by" in caplog.text
    caplog.clear()
    assert sample(cache_steps(model, ANYTHING), description).equal(unpatched)  # 4 steps: three, and the last one
    reason = "first_steps 3 (the first 3 are, whatever it says) and last_steps 1 say so: lower them, or make more steps"
    assert f"all 4 steps were computed; {reason}." in caplog.text
    sample(cache_steps(model, ForecastSettings(1e6, last_steps=100)), description, steps=STEPS)
    assert "and last_steps 100 say so" in caplog.text and "raise tolerance" not in caplog.text


def test_a_sampler_that_does_not_evaluate_in_its_last_step_gets_the_reason(caplog):
    description, model, _ = tiny("wan_t2v")
    sample(cache_steps(model, ForecastSettings(1e-9)), description, steps=STEPS, sampler="dpm_fast")
    assert "were computed; the best forecast is estimated to be off by" in caplog.text


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_windows_that_move_are_told(schedule, caplog):
    description, model, _ = tiny("wan_t2v")
    clone = cache_steps(windowed(model, schedule, 5, 2), ForecastSettings(0.001))
    sample(clone, description, latent=(15, *description.latent[1:]), steps=STEPS)
    moved = "context windows moved from step to step, which leaves none to go on: take static ones."
    assert (moved in caplog.text) == (schedule == "standard_uniform")
    assert ("raise tolerance" in caplog.text) != (moved in caplog.text)


@pytest.mark.parametrize("frames", [14, 35])
def test_static_windows_are_forecast_however_many_there_are(frames, caplog):
    description, model, _ = tiny("wan_t2v")
    clone = cache_steps(windowed(model, "standard_static", 5, 2), ANYTHING)
    with caplog.at_level(logging.INFO, LOG):
        sample(clone, description, latent=(frames, 4, 4), steps=STEPS)
    (told,) = re.findall(r"(\d+) of (\d+) evaluations of context windows were left out", caplog.text)
    left_out, count = map(int, told)
    assert 2 * left_out == count and count % STEPS == 0 and count > STEPS


def test_of_windows_that_move_each_is_counted(caplog):
    """What some of a step's windows made stood for nothing, since others were computed."""
    description, model, _ = tiny("wan_t2v")
    clone = cache_steps(windowed(model, "standard_uniform", 5, 2), ANYTHING)
    with caplog.at_level(logging.INFO, LOG):
        sample(clone, description, latent=(15, *description.latent[1:]), steps=STEPS + 4)
    told = re.search(r"(\d+) of \d+ evaluations of context windows were left out", caplog.text)
    assert "were computed" in caplog.text or int(told[1]) > 0


def test_of_windows_that_come_and_go_the_last_are_kept():
    cache = _Cached(ANYTHING, forecast_log())
    static = [f"frames {n} to {n + 1}" for n in range(3 * WINDOWS)]
    kept = [cache._window(name, step) for step in range(2) for name in static]
    assert kept[: len(static)] == kept[len(static) :]
    for step in range(2, 5):  # others in each step
        for name in static:
            cache._window(f"{name} in step {step}", step)
    assert len(cache._windows) == 2 * len(static)  # of that step and the one before
    few = _Cached(ANYTHING, forecast_log())
    once = few._window("once", 0)
    for step in range(1, WINDOWS):
        few._window(f"of step {step}", step)
    assert few._window("once", WINDOWS) is once  # as few as these are kept, whenever they come again


def test_new_noise_in_each_step_is_no_line():
    """The noise that the model sees is another one then."""
    description, model, _ = tiny("wan_t2v")
    options = {"steps": STEPS, "sampler": "euler_ancestral"}
    clone = cache_steps(model, ForecastSettings(0.1))
    seen = passes(clone)
    assert sample(clone, description, **options).equal(sample(model, description, **options))
    assert len(seen) == passes_of(model, description)


@pytest.mark.parametrize("sampler", ["lcm", "euler_ancestral", "dpmpp_sde"])
def test_new_noise_is_told_with_what_helps(sampler, caplog):
    """The input of the node ends at 1, and the advice named 8.44."""
    description, model, _ = tiny("wan_t2v")
    sample(cache_steps(steady(model), ForecastSettings(0.1)), description, steps=20, sampler=sampler)
    assert "raise tolerance" not in caplog.text
    assert "a sampler that adds noise in each step leaves no line to go on, so take euler, uni_pc" in caplog.text


@pytest.mark.parametrize(("sampler", "is_cause"), [("euler", False), ("euler_ancestral", True)])
def test_a_sampler_is_the_cause_only_where_it_adds_noise(sampler, is_cause, caplog):
    """A model of random weights makes something else in each step, too."""
    description, model, _ = tiny("ltxav")
    sample(cache_steps(model, ForecastSettings(0.001)), description, steps=20, sampler=sampler)
    assert "too far for any tolerance" in caplog.text and "raise tolerance" not in caplog.text
    assert ("a sampler that adds noise" in caplog.text) == is_cause


def test_noise_that_begins_on_the_way():
    """sa_solver has steps without it first."""
    description, model, _ = tiny("wan_t2v")
    description = replace(description, cfg=1.0)
    options = {"steps": 20, "sampler": "sa_solver"}
    begins = 20 * 0.2  # of the levels, from which on it adds noise
    clone = cache_steps(steady(model), ForecastSettings(0.1))
    seen = passes(clone)
    sample(clone, description, **options)
    assert len(seen) > 20 - begins


def test_calls_apart_for_each_prompt(caplog):
    """As DualModelGuider makes them, and guidance that comes after the usual one: each has a line of its own."""
    from comfy.patcher_extension import WrappersMP

    description, model, _ = tiny("wan_t2v")

    def apart(executor, model, conds, *more):
        return [executor(model, [cond], *more)[0] for cond in conds]

    made = []
    for inner in (False, True):
        clone = cache_steps(model, ANYTHING) if inner else model.clone()
        outer = clone.clone()
        outer.wrappers[WrappersMP.CALC_COND_BATCH] = {}
        outer.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "apart", apart)
        for key, wrappers in clone.wrappers.get(WrappersMP.CALC_COND_BATCH, {}).items():
            for wrapper in wrappers:
                outer.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, wrapper)
        made.append(sample(outer, description, steps=STEPS))
    together = sample(cache_steps(model, ANYTHING), description, steps=STEPS)
    torch.testing.assert_close(made[0], sample(model, description, steps=STEPS), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(made[1], together, atol=1e-4, rtol=1e-3)


def test_a_sampler_with_two_calls_a_step():
    description, model, _ = tiny("wan_t2v")
    options = {"steps": STEPS, "sampler": "heun"}
    wanted = sample(steady(model), description, **options)
    clone = steady(cache_steps(model, ForecastSettings(1e-2, most=0)))
    seen = passes(clone)
    torch.testing.assert_close(sample(clone, description, **options), wanted, atol=1e-3, rtol=1e-3)
    assert len(seen) < 10 < passes_of(model, description, "heun")


@pytest.mark.parametrize(
    ("sampler", "evaluations"), [("heun", 15), ("dpm_2", 15), ("exp_heun_2_x0", 15), ("uni_pc", 0)]
)
def test_what_is_left_out_of_steps_with_two_evaluations_is_told(sampler, evaluations, caplog):
    description, model, _ = tiny("wan_t2v")
    for settings in (ANYTHING, ForecastSettings(1e-9)):
        caplog.clear()
        clone = cache_steps(model, settings)
        seen = passes(clone)
        with caplog.at_level(logging.INFO, LOG):
            sample(clone, description, steps=STEPS, sampler=sampler)
        count, unit = (evaluations, "evaluations") if evaluations else (STEPS, "steps")
        assert settings is ANYTHING or len(seen) == count
        left_out = f"{count - len(seen)} of {count} {unit} were left out"
        assert (left_out if settings is ANYTHING else f"all {count} {unit} were computed") in caplog.text


def test_a_pass_with_layers_left_out_is_another():
    """SkipLayerGuidanceDiTSimple leaves layers out of the negative pass in a part of the steps."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple

    description, model, _ = tiny("wan_t2v")

    def skipping(model):
        settings = {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 0.6}
        execute = getattr(SkipLayerGuidanceDiTSimple, "execute", None) or SkipLayerGuidanceDiTSimple().skip_guidance
        found = execute(model, **settings)
        return found.args[0] if hasattr(found, "args") else found[0]

    steps = []
    for first in (0.0, 0.6):  # in the same steps, a new branch needs points of its own
        clone = cache_steps(skipping(model) if first else model, ANYTHING)
        seen = passes(clone)
        sample(clone, description, steps=12)
        steps.append(sum(seen))
    assert steps[1] >= steps[0] + 4  # both passes, twice for a line


def test_without_guidance():
    description, model, _ = tiny("wan_t2v")
    alone = replace(description, cfg=1.0)
    clone = cache_steps(model, ANYTHING)
    seen = passes(clone)
    assert sample(clone, alone, steps=STEPS).isfinite().all() and len(seen) == 4


@pytest.mark.parametrize("first", ["sparse", "cache"])
def test_with_sparse_attention_in_either_order(first):
    description, model, _ = tiny("wan_t2v")
    made = cache_steps(model, ANYTHING) if first == "cache" else model
    made, session = patched(made)
    made = made if first == "cache" else cache_steps(made, ANYTHING)
    sample(made, description, steps=STEPS)
    assert {record.step for record in session.report().records} == {0, 1, 2, 7}


def test_the_node():
    from vidaccel.nodes.forecast_node import NODES, VidaccelForecastCache

    description, model, _ = tiny("wan_t2v")
    settings = defaults(VidaccelForecastCache)
    assert settings["tolerance"] == ForecastSettings().tolerance
    clone, report = VidaccelForecastCache.execute(model, **(settings | {"tolerance": 1.0})).result
    seen = passes(clone)
    sample(clone, description, steps=20)
    assert "Note: Forecast Cache: " in (text := report_text(report.news())) and "of 20 steps were left out" in text
    assert report_text(report.news("another entry")).startswith("Note")
    assert clone is not model and len(seen) < passes_of(model, description) / STEPS * 20
    assert [VidaccelForecastCache] == NODES


def test_what_it_refuses():
    _, model, _ = tiny("wan_t2v")
    with pytest.raises(InputError, match="has a forecast cache already"):
        cache_steps(cache_steps(model, ANYTHING), ANYTHING)
    with pytest.raises(InputError, match="has a guidance cache"):
        cache_steps(cache_guidance(model, GuidanceCache(2)), ANYTHING)
    with pytest.raises(InputError, match="has a forecast cache"):
        cache_guidance(cache_steps(model, ANYTHING), GuidanceCache(2))
