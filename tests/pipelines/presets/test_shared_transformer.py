"""A preset in a pipeline, and another pipeline that shares the transformer and has a scheduler of its own."""

from __future__ import annotations

import pytest
import torch
from eager_caches import EAGER
from tiny_wan import generate, make_pipe, make_scheduler

import vidaccel
from vidaccel import Preset, Tangent

PRESETS = {
    "sparse": Preset(method=Tangent(density=0.6, q_clusters=2, k_clusters=2)),  # with first_steps of 0.2
    "guidance": Preset(guidance_cache=3),
    "forecast": Preset(cache=EAGER["forecast"]),
    "magcache": Preset(cache=EAGER["magcache"]),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_other_has_the_preset_with_it_by_its_own_scheduler(pair, name):
    alone = make_pipe()
    with vidaccel.apply(alone, PRESETS[name]) as handle:
        expected = generate(alone, steps=10)
        steps = [(s.num_steps, s.computed, s.attention) for s in handle.report().steps]
    pipe, other = pair
    with vidaccel.apply(pipe, PRESETS[name]) as handle:
        for runs, called in enumerate((other, pipe, other), 1):  # the first time the given one has never run
            assert generate(called, steps=10).equal(expected)
            account = handle.report()
            assert len(account.runs()) == runs
            assert [(s.num_steps, s.computed, s.attention) for s in account.last().steps] == steps
        assert not any("outside" in note or "threshold" in note for note in account.notes)


def test_a_loop_of_ones_own_with_another_scheduler_is_told_why_nothing_is_forecast():
    pipe = make_pipe()
    with vidaccel.apply(pipe, PRESETS["forecast"]) as handle:
        own_loop(pipe.transformer, steps=8)
        (why,) = handle.report().own_notes
    assert "outside of calls of the pipeline, with another scheduler than its own" in why


def own_loop(transformer: torch.nn.Module, steps: int) -> None:
    scheduler = make_scheduler()
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            for text in (1.0, 0.0):
                made = transformer(latents, t[None], torch.full((1, 6, 16), text), return_dict=False)[0]
            latents = scheduler.step(made, t, latents, return_dict=False)[0]


@pytest.mark.parametrize("first_steps", [0.2, 2])
def test_a_guidance_cache_makes_both_passes_where_a_fraction_is_of_an_unknown_number(first_steps):
    pipe = make_pipe()
    with vidaccel.guidance_cache(pipe, first_steps=first_steps) as handle:
        own_loop(pipe.transformer, steps=8)
        (note,) = handle.notes()
        handle.reset()
        assert "no step" in handle.notes()[0]
    if first_steps == 2:
        assert "made 4 of 8 second passes" in note
    else:
        assert "6 of 8 steps" in note and "first_steps=0.2 is a fraction" in note and "whole number" in note
