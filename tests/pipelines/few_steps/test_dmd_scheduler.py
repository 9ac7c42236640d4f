"""The sampler of DMD2: FastWan's levels, a trajectory against the published loop, and its place in a Wan pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from tiny_wan import generate, make_pipe

import vidaccel
from vidaccel import DMDScheduler, Preset
from vidaccel.pipelines.presets.levers import SchedulerChoice


def test_levels_are_those_of_the_nearest_rows_of_a_shifted_table():
    scheduler = DMDScheduler()
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == [1000.0, 757.0, 522.0]
    # diffusers' own table with a shift of 8, which FastVideo looks its timesteps up in.
    table = FlowMatchEulerDiscreteScheduler(shift=8.0)
    nearest = [table.sigmas[(table.timesteps - t).abs().argmin()].item() for t in (1000, 757, 522)]
    assert scheduler.sigmas.tolist() == pytest.approx([*nearest, 0.0], abs=1e-6)
    assert nearest == pytest.approx([1.0, 2.24 / 2.96, 0.96 / 1.84], abs=1e-6)


def test_fewer_steps_leave_out_the_last_ones():
    scheduler = DMDScheduler()
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1000.0, 757.0] and scheduler.sigmas.tolist()[-1] == 0.0


def test_a_trajectory_in_float64():
    """FastVideo's loop, written in numpy: what is predicted to be clean, and new noise for the next level."""
    scheduler = DMDScheduler()
    scheduler.set_timesteps(3)
    levels, generator = [1.0, 2.24 / 2.96, 0.96 / 1.84], torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    wanted, made = x.double().numpy(), x
    draw = torch.Generator().manual_seed(3)
    noise = [torch.randn(x.shape, generator=draw).double().numpy() for _ in range(2)]
    for place, level in enumerate(levels):
        clean = wanted - level * (np.sin(3 * wanted) * level)
        wanted = clean if place == 2 else (1 - levels[place + 1]) * clean + levels[place + 1] * noise[place]
        velocity = (made.double() * 3).sin() * level
        made = scheduler.step(velocity, scheduler.timesteps[place], made, generator).prev_sample
    assert made.dtype == torch.float32
    np.testing.assert_allclose(made.numpy(), wanted, atol=2e-6)


def test_in_a_pipeline_and_its_files(tmp_path):
    pipe = make_pipe(scheduler=DMDScheduler())
    made = generate(pipe, steps=3, guidance_scale=1.0)
    assert made.isfinite().all() and generate(pipe, steps=3, guidance_scale=1.0).equal(made)
    pipe.scheduler.save_pretrained(tmp_path)
    again = DMDScheduler.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["denoising_timesteps"] == [1000, 757, 522]
    pipe.scheduler = again
    assert generate(pipe, steps=3, guidance_scale=1.0).equal(made)
    with pytest.raises(ValueError, match="num_inference_steps is 20: this model is distilled to 1 to 3 steps. Give 3"):
        generate(pipe, steps=20)


def test_as_the_scheduler_of_a_preset():
    choice = SchedulerChoice("DMDScheduler", {"denoising_timesteps": [1000, 500]})
    pipe = make_pipe()
    with vidaccel.apply(pipe, Preset(scheduler=choice, num_inference_steps=2, guidance_scale=1.0)):
        assert isinstance(pipe.scheduler, DMDScheduler) and pipe.scheduler.most_steps == 2
        assert generate(pipe, steps=2, guidance_scale=1.0).isfinite().all()
    assert isinstance(pipe, WanPipeline) and not isinstance(pipe.scheduler, DMDScheduler)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoising_timesteps": []}, r"denoising_timesteps are \[\]: they must fall"),
        ({"denoising_timesteps": [500, 700]}, "they must fall, from at most 1000 to above 0"),
        ({"denoising_timesteps": [1001, 700]}, "from at most 1000"),
        ({"denoising_timesteps": [700, 0]}, "to above 0"),
        ({"shift": 0.0}, "shift is 0.0: it must be above 0, such as 8"),
    ],
)
def test_settings_out_of_bounds(settings, message):
    with pytest.raises(ValueError, match=message):
        DMDScheduler(**settings)
