"""Schedulers that draw noise in their steps, to which pipelines give no generator: same seed, same video."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, WanPipeline

import vidaccel
from vidaccel import Preset, demo
from vidaccel.generation.models.inspected import inspect_pipeline
from vidaccel.generation.models.scheduler_noise import seeded
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.tuning.trajectory import probe, record
from vidaccel.pipelines.presets import Cache

PROMPT = "a red circle moves left on a grey background"
TINY = {"frames": 9, "height": 64, "width": 64}
SMALL = {**TINY, "steps": 6, "progress": False}
CPU = torch.device("cpu")


@pytest.fixture
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    return pipe


@pytest.mark.parametrize("kind", ["lcm", "sde"])
def test_the_same_seed_makes_the_same_video(pipe, kind):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe.scheduler = (
        FlowMatchLCMScheduler()
        if kind == "lcm"
        else DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **flow)
    )

    def frames(seed: int, others: int) -> np.ndarray:
        torch.manual_seed(others)  # another state, as each process has
        return vidaccel.generate(pipe, PROMPT, method="dense", seed=seed, **SMALL).frames

    assert np.array_equal(frames(0, 1), frames(0, 2))
    assert not np.array_equal(frames(0, 1), frames(1, 1))


def test_what_is_compared_has_the_same_noise(pipe):
    """Also where passes are skipped: a step draws once, whoever computes it."""
    options = {"method": "dense", "compare": True, "seed": 0, **SMALL}
    nothing = vidaccel.generate(pipe, PROMPT, preset=Preset(cache=Cache("forecast", 1e-6)), **options)
    some = vidaccel.generate(pipe, PROMPT, preset=Preset(guidance_cache=2), **options)
    other = vidaccel.generate(pipe, PROMPT, method="dense", seed=1, **SMALL)
    dense = some.videos[0].frames
    assert np.array_equal(dense, nothing.videos[0].frames) and np.array_equal(dense, nothing.videos[1].frames)
    apart = [np.square(dense.astype(float) - frames).mean() for frames in (some.videos[1].frames, other.frames)]
    assert 0 < 2 * apart[0] < apart[1]


def test_single_steps_and_rows_of_levers_have_it_too(pipe):
    settings = Settings(PROMPT, seed=3, steps=4, **TINY).checked(inspect_pipeline(pipe))
    trajectory, frames = record(pipe, settings)
    assert np.array_equal(frames, record(pipe, settings)[1])
    same = probe(pipe, settings, trajectory, Preset(name="same"), range(4))
    assert same.errors == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}
    nothing = Preset(name="nothing", cache=Cache("forecast", 1e-6))
    made = vidaccel.waterfall(pipe, nothing, [PROMPT], rounds=1, **SMALL)
    assert [row.psnr for row in made.rows] == [(math.inf,), (math.inf,)]


def test_the_noise_of_steps_is_not_the_first_one_and_others_keep_theirs():
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    with seeded(CPU, 0):
        own = torch.randn(64)
    with pytest.raises(ValueError), seeded(CPU, 0):
        raise ValueError
    assert torch.equal(torch.randn(4), expected)
    assert not torch.equal(own, torch.randn(64, generator=torch.Generator().manual_seed(0)))
