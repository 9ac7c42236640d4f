"""The forecast cache in a pipeline: what it leaves out, tells, keeps and lets go of."""

from __future__ import annotations

import pytest
import torch
from tiny_wan import generate, make_pipe, make_transformer

import vidaccel
from vidaccel import Preset
from vidaccel.pipelines.hooks.diffusers_hooks import FORECAST_HOOK, hooks_of
from vidaccel.pipelines.presets import Cache, PresetError

ANYTHING = Preset(cache=Cache("forecast", 1e6))


def computed(handle) -> list[int]:
    return [step.step for step in handle.report().last().steps if step.computed]


def test_it_lets_go_of_a_run_when_it_ends():
    """Decoding, which comes next, needs the memory."""
    pipe = make_pipe()
    for settings in ({}, {"cache_end_steps": 0}):
        with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e6, settings))) as handle:
            first = generate(pipe, steps=8)
            hook = hooks_of(pipe.transformer)[FORECAST_HOOK]
            assert not hook._forms and not hook._forecasts._branches and hook._forecasts._way._latents is None
            assert generate(pipe, steps=8).equal(first)
            assert computed(handle) == [0, 1, 2] + ([] if settings else [7])
    assert FORECAST_HOOK not in hooks_of(pipe.transformer)


def test_it_tells_how_far_off_the_best_forecast_would_have_been():
    """And with that as the threshold, a step is left out."""
    pipe = make_pipe()
    plain = generate(pipe, steps=8)
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e-6))) as handle:
        assert generate(pipe, steps=8).equal(plain)
        told, idle = handle.report().notes
    assert told.startswith("forecast: the best one for the transformer is estimated to be off by ")
    assert idle.endswith("skipped no pass: raise the threshold, or make more steps")
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e6))) as handle:
        generate(pipe, steps=4)
        (idle,) = handle.report().notes
    kept = "the first 3 (retention_steps) and last 1 (cache_end_steps) of 4 steps are computed"
    assert idle.endswith(f"skipped no pass: {kept}; lower these, or make more steps")
    off = float(told.rpartition(" ")[2])
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1.01 * off))) as handle:
        assert not generate(pipe, steps=8).equal(plain)
        assert "1 steps of the transformer in the last run" in handle.report().notes[0]


def test_a_lower_threshold_computes_more_and_is_nearer():
    pipe = make_pipe()
    plain = generate(pipe, steps=12)
    off, passes = [], []
    for threshold in (0.3, 1.0, 1e6):
        with vidaccel.apply(pipe, Preset(cache=Cache("forecast", threshold))) as handle:
            off.append((generate(pipe, steps=12) - plain).norm().item())
            passes.append(len(computed(handle)))
    assert passes == sorted(passes, reverse=True) and passes[0] > passes[-1] and off[0] < min(off[1:])


def test_the_settings():
    pipe = make_pipe()
    for settings, wanted in (
        ({"retention_steps": 6}, [0, 1, 2, 3, 4, 5, 11]),
        ({"cache_end_steps": 3}, [0, 1, 2, 8, 9, 10, 11]),
        ({"max_consecutive_cached": 2}, [0, 1, 2, 5, 8, 11]),
        ({"max_consecutive_cached": 0}, [0, 1, 2, 11]),
    ):
        with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e6, settings))) as handle:
            generate(pipe, steps=12)
            assert computed(handle) == wanted, settings


def test_in_half_precision():
    pipe = make_pipe().to(torch.bfloat16)
    plain = generate(pipe, steps=8)
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e6, {"max_consecutive_cached": 1}))) as handle:
        made = generate(pipe, steps=8)
        assert computed(handle) == [0, 1, 2, 4, 6, 7]
    assert made.dtype == plain.dtype and made.isfinite().all()
    assert 0 < (made - plain).float().norm() < plain.float().norm()


def test_two_runs_that_differ_in_size_and_steps():
    pipe = make_pipe()
    with vidaccel.apply(pipe, ANYTHING) as handle:
        wanted = generate(pipe, steps=6)
        generate(pipe, steps=12)
        assert len(computed(handle)) < 8
        generate(pipe, steps=6, size=32)
        assert generate(pipe, steps=6).equal(wanted)


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), True, "much"])
def test_thresholds_that_cannot_be(threshold):
    with pytest.raises(PresetError, match=r"cache\.threshold"):
        Cache("forecast", threshold)
    with pytest.raises(PresetError, match="forecast has no setting order; it has retention_steps"):
        Cache("forecast", 0.1, {"order": 2})


def test_noise_that_comes_in_between_is_seen():
    """A callback adds some after step 5, and all that was known of the way is forgotten."""
    pipe = make_pipe()

    def add(pipe, number, timestep, tensors):
        if number == 5:
            noise = torch.randn(tensors["latents"].shape, generator=torch.Generator().manual_seed(7))
            tensors["latents"] = tensors["latents"] + 0.3 * noise
        return tensors

    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e6, {"max_consecutive_cached": 2}))) as handle:
        generate(pipe, steps=12)
        assert computed(handle) == [0, 1, 2, 5, 8, 11]
        generate(pipe, steps=12, callback_on_step_end=add)
        assert computed(handle) == [0, 1, 2, 5, 6, 7, 8, 11]


def test_second_rows_of_a_level_are_computed():
    """Heun's: nothing tells how far off the noise of other latents at the same level would be."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = make_pipe(scheduler=FlowMatchHeunDiscreteScheduler(shift=3.0))
    plain = generate(pipe, steps=8)
    with vidaccel.apply(pipe, Preset(cache=Cache("forecast", 1e-6))) as handle:
        assert generate(pipe, steps=8).equal(plain) and not handle.report().counts()["skipped"]


def test_a_transformer_compiled_as_a_whole_stays_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe = make_pipe()
    plain = generate(pipe, steps=6)
    pipe.transformer.compile(backend=backend)
    with vidaccel.apply(pipe, ANYTHING) as handle:
        made = generate(pipe, steps=6)
        assert computed(handle) == [0, 1, 2, 5] and graphs
    assert not made.equal(plain)
    torch.compiler.reset()


def test_of_two_transformers_each_is_told_and_lets_go():
    pipe = make_pipe(transformer_2=make_transformer(1), boundary_ratio=0.8)
    with vidaccel.apply(pipe, ANYTHING) as handle:
        generate(pipe, steps=16)
        for part in (pipe.transformer, pipe.transformer_2):
            hook = hooks_of(part)[FORECAST_HOOK]
            assert not hook._forms and not hook._forecasts._branches
        told = [note for note in handle.report().notes if note.startswith("forecast")]
        assert ["transformer in" in told[0], "transformer_2 in" in told[1]] == [True, True]


def test_a_run_with_gradients_is_computed():
    pipe = make_pipe()
    with vidaccel.apply(pipe, ANYTHING):
        given = {"hidden_states": torch.randn(1, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 16)}
        given["hidden_states"].requires_grad_(True)
        made = [pipe.transformer(**given, timestep=torch.tensor([900.0 - 50 * n])).sample for n in range(6)]
        assert all(x.requires_grad for x in made)
