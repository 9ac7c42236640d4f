"""A resumed run may share the clips of a step otherwise, among micro-steps and processes, and keeps their number."""

from __future__ import annotations

import pytest
import torch

from vidaccel.lora.checkpoints.checkpoint import CheckpointError
from vidaccel.lora.distributed.step_clips import step_clips_differences
from vidaccel.lora.recipes.reconstructing import ReconstructionPhase, ReconstructionSettings
from vidaccel.lora.settings import DataSettings, SizeSettings
from vidaccel.lora.stopping import Stopped


def phases(batch_size: int, micro: int = 1) -> dict:
    shared = {"batch_size": batch_size, "gradient_accumulation_steps": micro}
    return {"first": {"steps": 4, "learning_rate": 0.01, **shared}, "second": {"steps": 0}}


def test_a_run_goes_on_with_the_same_clips_in_other_micro_steps(tiny_settings, run_tiny, stop_after, monkeypatch):
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
    straight = run_tiny(tiny_settings("straight", phases=phases(4)))
    stop_after(2)
    with pytest.raises(Stopped):
        run_tiny(tiny_settings(phases=phases(4)))
    resumed = run_tiny(tiny_settings(phases=phases(1, 4)), "latest")
    clips = [sum((entry[2] for entry in seen), ()) for seen in (straight.seen[2:], resumed.seen)]
    assert clips[0] == clips[1] and len(clips[0]) == 8
    for name, value in straight.trained.items():
        torch.testing.assert_close(value, resumed.trained[name], rtol=1e-5, atol=1e-6)


def test_other_clips_a_step_are_refused_with_what_would_fit(tiny_settings, run_tiny, stop_after):
    stop_after(2)
    with pytest.raises(Stopped):
        run_tiny(tiny_settings(phases=phases(4)))
    with pytest.raises(CheckpointError, match=r"phases\.first: 4 clips .* then, 2 clips .*steps=2$"):
        run_tiny(tiny_settings(phases=phases(2)), "latest")


def settings(micro: int, *batch_sizes: int | None) -> ReconstructionSettings:
    sizes = tuple(SizeSettings(frames, 32, 32, batch) for frames, batch in zip((1, 8), batch_sizes, strict=True))
    later = ReconstructionPhase(steps=2, batch_size=3, gradient_accumulation_steps=micro, name="later")
    first = ReconstructionPhase(steps=2, name="first", sizes=(SizeSettings(8, 64, 64),))
    data = DataSettings(sizes=sizes)
    return ReconstructionSettings(recipe="autoencoder", out="run", data=data, phases=(first, later))


def test_each_size_and_each_phase_that_is_left_counts():
    old = settings(1, None, 4)
    assert step_clips_differences(old, settings(1, 3, 4), 8, 8) == []
    halved = step_clips_differences(old, settings(2, 3, 4), 8, 4)
    assert [line.split(":")[0] for line in halved] == ["phases.0"]
    new = settings(2, 3, 4)
    assert step_clips_differences(old, new, 8, 4, [new.phases[0]]) == []
    (line,) = step_clips_differences(old, other := settings(2, 3, 8), 8, 4, [other.phases[0]])
    assert line == (
        "phases.1: 32 clips a step (batch_size 4 x gradient_accumulation_steps 1 x 8 processes) then, 64 clips a step "
        "(batch_size 8 x gradient_accumulation_steps 2 x 4 processes) now, in steps of 8 frames of 32x32: give "
        "phases.1.gradient_accumulation_steps=1"
    )
    last = step_clips_differences(settings(1, 1, 1), settings(2, 1, 1), 2, 5)[-1]
    assert last.endswith(": give another batch_size, or as many processes as then")
