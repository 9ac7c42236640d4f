from __future__ import annotations

import pytest
import torch

from vidaccel.pipelines.clock import StepClock


class Scheduler:
    def __init__(self, timesteps):
        self.set(timesteps)

    def set(self, timesteps):
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        self.sigmas = torch.cat([self.timesteps / 1000, torch.zeros(1)])


def watch(clock: StepClock, *timesteps: float, model: str = "transformer"):
    seen = [clock.observe(torch.full((2,), float(t)), model, ("cond", "uncond")) for t in timesteps]
    return [(s.run, s.step, s.branch) for s in seen]


def test_steps_branches_and_runs_of_a_scheduler():
    scheduler = Scheduler([900, 600, 300])
    clock = StepClock(scheduler)
    assert watch(clock, 900, 900, 600, 600, 300, 300) == [
        (0, 0, "cond"), (0, 0, "uncond"), (0, 1, "cond"), (0, 1, "uncond"), (0, 2, "cond"), (0, 2, "uncond"),
    ]  # fmt: skip
    scheduler.set([900, 600, 300])
    assert watch(clock, 900, 600) == [(1, 0, "cond"), (1, 1, "cond")]


def test_the_scheduler_gives_steps_and_noise_levels():
    step = StepClock(Scheduler([900, 600])).observe(torch.tensor(600.0), "transformer", ("cond",))
    assert (step.num_steps, step.step) == (2, 1)
    assert step.sigma == pytest.approx(0.6)


def test_a_new_table_starts_a_run_even_at_the_same_timestep():
    """Runs of one step, and runs broken off at their first step, look alike from the timestep alone."""
    scheduler = Scheduler([500])
    clock = StepClock(scheduler)
    assert watch(clock, 500) == [(0, 0, "cond")]
    scheduler.set([500])
    assert watch(clock, 500) == [(1, 0, "cond")]


def test_without_a_scheduler_distinct_timesteps_count_and_a_rise_starts_a_run():
    clock = StepClock(None)
    assert watch(clock, 900, 900, 450, 1000) == [(0, 0, "cond"), (0, 0, "uncond"), (0, 1, "cond"), (1, 0, "cond")]
    assert clock.observe(torch.tensor(1000.0), "transformer", ("cond",)).num_steps is None


def test_two_transformers_share_the_count():
    clock = StepClock(Scheduler([900, 600, 300]))
    assert watch(clock, 900, 600) == [(0, 0, "cond"), (0, 1, "cond")]
    assert watch(clock, 300, model="transformer_2") == [(0, 2, "cond")]


def test_joining_late_and_second_order_tables_find_their_place():
    clock = StepClock(Scheduler([900, 600, 600, 300, 300]))
    assert watch(clock, 600, 300) == [(0, 1, "cond"), (0, 3, "cond")]


def test_clean_tokens_of_image_conditioning_do_not_hide_the_timestep():
    clock = StepClock(Scheduler([900, 600]))
    mixed = torch.tensor([[0.0, 0.0, 600.0, 600.0]])
    assert clock.observe(mixed, "transformer", ("cond",)).step == 1


def test_more_passes_than_names_are_numbered():
    clock = StepClock(Scheduler([900, 600]))
    assert watch(clock, 900, 900, 900)[-1] == (0, 0, "pass 2")
