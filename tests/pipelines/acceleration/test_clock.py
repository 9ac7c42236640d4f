from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vidaccel.pipelines.acceleration.clock import StepClock


class Scheduler:
    def __init__(self, timesteps):
        self.set(timesteps)

    def set(self, timesteps):
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        self.sigmas = torch.cat([self.timesteps / 1000, torch.zeros(1)])


def clock_of(scheduler) -> StepClock:
    return StepClock(SimpleNamespace(scheduler=scheduler))


def watch(clock: StepClock, *timesteps: float, model: str = "transformer"):
    seen = [clock.observe(torch.full((2,), float(t)), model, ("cond", "uncond")) for t in timesteps]
    return [(s.run, s.step, s.branch) for s in seen]


def test_steps_branches_and_runs_of_a_scheduler():
    scheduler = Scheduler([900, 600, 300])
    clock = clock_of(scheduler)
    assert watch(clock, 900, 900, 600, 600, 300, 300) == [
        (0, 0, "cond"), (0, 0, "uncond"), (0, 1, "cond"), (0, 1, "uncond"), (0, 2, "cond"), (0, 2, "uncond"),
    ]  # fmt: skip
    scheduler.set([900, 600, 300])
    assert watch(clock, 900, 600) == [(1, 0, "cond"), (1, 1, "cond")]


def test_the_scheduler_gives_steps_and_noise_levels():
    clock = clock_of(Scheduler([900, 600]))
    steps = [clock.observe(torch.tensor(t), "transformer", ("cond",)) for t in (900.0, 600.0)]
    assert [(s.num_steps, s.step) for s in steps] == [(2, 0), (2, 1)]
    assert [s.sigma for s in steps] == pytest.approx([0.9, 0.6])


def test_noise_levels_of_another_kind_are_unknown():
    scheduler = Scheduler([900, 600])
    scheduler.sigmas = torch.tensor([14.6, 2.0, 0.0])
    assert clock_of(scheduler).observe(torch.tensor(900.0), "transformer", ("cond",)).sigma is None


def test_a_run_that_starts_late_counts_from_its_first_step():
    """Video-to-video at half strength runs the second half of the table."""
    clock = clock_of(Scheduler([900, 700, 500, 300]))
    steps = [clock.observe(torch.tensor(t), "transformer", ("cond",)) for t in (500.0, 300.0)]
    assert [(s.step, s.num_steps) for s in steps] == [(0, 2), (1, 2)]
    assert steps[0].sigma == pytest.approx(0.5)


def test_a_scheduler_swapped_between_runs_is_the_one_that_counts():
    pipe = SimpleNamespace(scheduler=Scheduler([900, 600]))
    clock = StepClock(pipe)
    assert watch(clock, 900, 600) == [(0, 0, "cond"), (0, 1, "cond")]
    pipe.scheduler = Scheduler([900, 700, 500, 300])
    assert watch(clock, 900, 500) == [(1, 0, "cond"), (1, 2, "cond")]
    assert clock.observe(torch.tensor(300.0), "transformer", ("cond",)).num_steps == 4


def test_a_new_table_starts_a_run_even_at_the_same_timestep():
    """Runs of one step, and runs broken off at their first step, look alike from the timestep alone."""
    scheduler = Scheduler([500])
    clock = clock_of(scheduler)
    assert watch(clock, 500) == [(0, 0, "cond")]
    scheduler.set([500])
    assert watch(clock, 500) == [(1, 0, "cond")]


def test_without_a_scheduler_distinct_timesteps_count_and_a_rise_starts_a_run():
    clock = clock_of(None)
    assert watch(clock, 900, 900, 450, 1000) == [(0, 0, "cond"), (0, 0, "uncond"), (0, 1, "cond"), (1, 0, "cond")]
    assert clock.observe(torch.tensor(1000.0), "transformer", ("cond",)).num_steps is None


def test_without_a_scheduler_a_loop_at_one_timestep_is_many_runs_not_many_branches():
    seen = watch(clock_of(None), 500, 500, 500, 500, 500)
    assert seen == [(0, 0, "cond"), (0, 0, "uncond"), (1, 0, "cond"), (1, 0, "uncond"), (2, 0, "cond")]


def test_two_transformers_share_the_count():
    clock = clock_of(Scheduler([900, 600, 300]))
    assert watch(clock, 900, 600) == [(0, 0, "cond"), (0, 1, "cond")]
    assert watch(clock, 300, model="transformer_2") == [(0, 2, "cond")]


def test_tables_of_second_order_schedulers_have_each_timestep_twice():
    clock = clock_of(Scheduler([900, 600, 600, 300, 300]))
    assert watch(clock, 900, 600, 300) == [(0, 0, "cond"), (0, 1, "cond"), (0, 3, "cond")]


def test_clean_tokens_of_image_conditioning_do_not_hide_the_timestep():
    clock = clock_of(Scheduler([900, 600]))
    watch(clock, 900)
    mixed = torch.tensor([[0.0, 0.0, 600.0, 600.0]])
    assert clock.observe(mixed, "transformer", ("cond",)).step == 1


def test_more_passes_than_names_are_numbered():
    clock = clock_of(Scheduler([900, 600]))
    assert watch(clock, 900, 900, 900)[-1] == (0, 0, "pass 2")


def test_noise_levels_are_read_once_for_a_table():
    """On a GPU, each look at them would wait for all that was launched."""

    class Counted(torch.Tensor):
        looks = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.looks += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    scheduler = Scheduler([900, 600, 300])
    scheduler.sigmas = scheduler.sigmas.as_subclass(Counted)
    clock, seen = clock_of(scheduler), []
    for t in (900.0, 600.0, 300.0):
        level = clock.observe(torch.tensor(t), "transformer", ("cond",)).sigma
        seen.append((level, Counted.looks))
    assert [level for level, _ in seen] == pytest.approx([0.9, 0.6, 0.3]) and len({looks for _, looks in seen}) == 1
    scheduler.set([800, 400])
    assert clock.observe(torch.tensor(800.0), "transformer", ("cond",)).sigma == pytest.approx(0.8)
