"""What an engine keeps from one step of a training to the next, and what it does not."""

from __future__ import annotations

import pytest
import torch

from vidaccel import LVSA, SVG, BlockPlan, DenseSchedule, SparseAttention, VideoLayout
from vidaccel.attention import RandomBlocks, StepInfo

LAYOUT = VideoLayout(5, 8, 8)


def tokens() -> tuple[torch.Tensor, ...]:
    return torch.randn(3, 1, 2, LAYOUT.tokens, 16).unbind(0)


def make(method) -> SparseAttention:
    return SparseAttention(method, num_layers=2, schedule=DenseSchedule())


TURNING = [RandomBlocks(redraw=False), LVSA(reference=2, window=0, first_frames=0), SVG(density=0.9, profile_rows=1)]


def plans_of(engine, monkeypatch) -> list[BlockPlan]:
    """To which each plan that the engine's method makes is added."""
    plans, made = [], type(engine.method).plan
    monkeypatch.setattr(type(engine.method), "plan", lambda *given: plans.append(made(*given)) or plans[-1])
    return plans


@pytest.mark.parametrize("method", TURNING, ids=lambda method: method.name)
def test_what_goes_by_turns_or_is_drawn_once_does_so_in_a_training(method, monkeypatch):
    """The anchors of LVSA stood still in a training, and fixed blocks at random were drawn anew at each step."""
    given, masks = tokens(), []
    for gradients in (False, True):
        engine = make(method)
        with monkeypatch.context() as patch:
            plans = plans_of(engine, patch)
            for step in range(4):
                engine.enter(StepInfo(step=step, num_steps=4), LAYOUT)
                engine(*(x.clone().requires_grad_(gradients) for x in given), 0)
        masks.append([plan.to_dense_mask() for plan in plans])
    assert all(a.equal(b) for a, b in zip(*masks, strict=True))


@pytest.mark.parametrize("method", TURNING, ids=lambda method: method.name)
def test_a_pass_that_comes_again_after_its_plans_were_dropped_has_its_turn(method, monkeypatch):
    """A second backward pass over checkpointed layers must have the plans of the forward pass."""
    engine = make(method)
    q, k, v = (x.clone().requires_grad_() for x in tokens())
    plans = plans_of(engine, monkeypatch)
    engine.enter(StepInfo(step=0, num_steps=9), LAYOUT)
    engine(q, k, v, 0)
    again = engine.pass_again()
    for step in (1, 2):
        engine.enter(StepInfo(step=step, num_steps=9), LAYOUT)  # which drops those of backward passes before
        engine(q, k, v, 0)
        again()
        engine(q, k, v, 0)
    first, second, *later = [plan.to_dense_mask() for plan in plans]
    assert len(later) == 2 and first.equal(later[1])
    if method.name == "lvsa":
        assert not first.equal(second) and not second.equal(later[0])


@pytest.mark.parametrize("method", ["svg2", "tangent"])
def test_training_plans_each_sample_from_itself(method):
    """Steps of a training are of other videos, whose clusters say nothing of this one."""
    engine, alone = make(method), make(method)
    samples = [[x.clone().requires_grad_() for x in tokens()] for _ in range(2)]
    engine.enter(StepInfo(step=0, num_steps=2), LAYOUT)
    engine(*samples[0], 0)
    engine.enter(StepInfo(step=1, num_steps=2), LAYOUT)
    alone.enter(StepInfo(step=0, num_steps=2), LAYOUT)
    assert engine(*samples[1], 0).equal(alone(*samples[1], 0))
