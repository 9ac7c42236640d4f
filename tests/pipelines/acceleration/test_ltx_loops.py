"""Loops of LTX that leave the last row of their table out."""

from __future__ import annotations

import diffusers
import pytest
import torch
from families import ltx
from tiny_pipelines import wan, watched

from vidaccel import DenseSchedule, Radial, accelerate

SIGMAS = [1.0, 0.9, 0.6, 0.3, 0.0]


@pytest.mark.parametrize("given", [{"sigmas": SIGMAS}, {"num_inference_steps": 5}], ids=["sigmas", "steps"])
def test_windows_have_the_steps_that_their_loop_has(given):
    """Of its table, the pipeline leaves the last row out, whether that is without noise or not."""
    torch.manual_seed(0)
    pipe = diffusers.LTXI2VLongMultiPromptPipeline(**ltx.parts(diffusers.LTXEulerAncestralRFScheduler()))
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 96, "num_frames": 33, "temporal_tile_size": 16, "temporal_overlap": 8}
    with accelerate(pipe, Radial(8), schedule=DenseSchedule(last_steps=1)) as handle:
        pipe("a dot", **size, **given, skip_steps_sigma_threshold=None)
        report = handle.report()
    assert len(report.runs()) > 1 and {r.call for r in report.records} == {0}
    for run in report.runs():
        assert {(r.step, r.num_steps) for r in report.records if r.run == run} == {(step, 4) for step in range(4)}
        assert {r.step for r in report.records if r.run == run and r.reason} == {3}
    assert not [note for note in report.notes if "steps seen" in note]


def test_a_table_that_ends_without_noise_where_no_loop_says_how_far_it_goes():
    pipe, options = wan(diffusers.LTXEulerAncestralRFScheduler())
    clock, seen = watched(pipe)
    latents, text = torch.randn(1, 4, 3, 8, 12), options["prompt_embeds"]
    for rows in (slice(-1), slice(None)):  # the second loop goes on to the last row all the same
        pipe.scheduler.set_timesteps(sigmas=SIGMAS)
        for t in pipe.scheduler.timesteps[rows]:
            with torch.no_grad():
                made = pipe.transformer(latents, t.expand(1), text).sample
            pipe.scheduler.step(made, t, latents)
    assert [(s.run, s.step, s.num_steps) for s in seen] == [
        *((0, step, 4) for step in range(4)),
        *((1, step, 4) for step in range(4)),
        (1, 4, 5),
    ]
    assert clock.notes() == []
