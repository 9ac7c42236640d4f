"""Euler steps at levels of their own: against the formula, in real pipelines, and saved with them."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from gft_calls import made
from tiny_wan import make_pipe

import vidaccel
from vidaccel import GridScheduler

LIGHTX2V = (1000.0, 937.5, 833.3333, 625.0)
"""The published times of lightx2v's LoRAs for four steps."""


def test_the_usual_levels_are_those_of_lightx2v():
    """Which neither of diffusers' schedulers makes of four steps and a shift of 5 without more settings."""
    scheduler = GridScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx(LIGHTX2V, abs=1e-3)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])
    other = FlowMatchEulerDiscreteScheduler(shift=5.0)
    other.set_timesteps(4)
    assert other.timesteps.tolist() != pytest.approx(LIGHTX2V, abs=20)


def test_steps_are_euler_s():
    scheduler = GridScheduler([0.9, 0.5])
    scheduler.set_timesteps(2)
    x, generator = torch.ones(1, 4), torch.Generator().manual_seed(0)
    wanted = x.clone()
    for t, (now, then) in zip(scheduler.timesteps, ((0.9, 0.5), (0.5, 0.0)), strict=True):
        v = torch.randn(1, 4, generator=generator)
        x = scheduler.step(v, t, x).prev_sample
        wanted = wanted + (then - now) * v
    torch.testing.assert_close(x, wanted)


def test_a_saved_pipeline_has_it(tmp_path, caplog):
    """And a sparse run of its four steps, one of them dense, is seen step by step."""
    pipe = make_pipe()
    pipe.scheduler = GridScheduler([1.0, 0.9, 0.75, 0.5])
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path, tokenizer=None, text_encoder=None, vae=None)
    again.set_progress_bar_config(disable=True)
    assert "not expected" not in caplog.text
    assert isinstance(again.scheduler, GridScheduler) and again.scheduler.levels == (1.0, 0.9, 0.75, 0.5)
    method = vidaccel.Radial(schedule=vidaccel.DenseSchedule(first_steps=1))
    with vidaccel.accelerate(again, method) as handle:
        made(again, 1.0, 4)
        steps = [(record.step, record.num_steps, record.reason) for record in handle.report().records]
    assert {step for step, *_ in steps} == {0, 1, 2, 3} and {count for _, count, _ in steps} == {4}
    assert {step for step, _, dense in steps if dense} == {0}


@pytest.mark.parametrize("sigmas", [(), (1.1, 0.5), (0.5, 0.5), (0.5, 0.9), (0.5, 0.0)])
def test_levels_that_do_not_fall(sigmas):
    with pytest.raises(ValueError, match="they must fall, from at most 1 to above 0"):
        GridScheduler(sigmas)


def test_other_steps_are_refused():
    scheduler = GridScheduler([1.0, 0.5])
    with pytest.raises(ValueError, match="num_inference_steps is 20, but the model was distilled to 2: give that"):
        scheduler.set_timesteps(20)
    with pytest.raises(ValueError, match="timesteps is given, but the noise levels are those of the training"):
        scheduler.set_timesteps(2, timesteps=[1000, 500])
