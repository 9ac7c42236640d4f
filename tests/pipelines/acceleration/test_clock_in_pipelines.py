"""The step clock in the loops of real diffusers pipelines, fed by a plain hook."""

from __future__ import annotations

import logging

import diffusers
import pytest
import torch
from tiny_pipelines import (
    cogvideox,
    cosmos2,
    framepack,
    helios,
    kandinsky5,
    listen,
    mochi,
    run,
    skyreels_diffusion_forcing,
    wan,
    watched,
)
from tiny_wan import make_pipe, make_scheduler, make_transformer

from vidaccel import SVG, DenseSchedule, accelerate, demo
from vidaccel.pipelines.acceleration import scheduler_table
from vidaccel.pipelines.acceleration.clock import StepClock


def places(seen, run: int = 0) -> list[tuple[int, str]]:
    return [(s.step, s.branch) for s in seen if s.run == run]


def both(steps: int) -> list[tuple[int, str]]:
    return [(step, branch) for step in range(steps) for branch in ("cond", "uncond")]


def one(steps: int) -> list[tuple[int, str]]:
    return [(step, "cond") for step in range(steps)]


def denoise(pipe, options, first: int = 0, step: bool = True) -> None:
    """A loop of the user's own around Wan, with guidance in two calls."""
    latents = torch.randn(1, 4, 3, 8, 12)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps[first:]:
            for text in ("prompt_embeds", "negative_prompt_embeds"):
                noise = pipe.transformer(latents, t.expand(1), options[text]).sample
            if step:
                latents = pipe.scheduler.step(noise, t, latents).prev_sample


def check(pipe, options, expected, steps: int = 4, sigmas: str = "fall"):
    """Two runs of a pipeline: each is one run, all its steps and branches are seen, and nothing is wrong."""
    clock, seen = watched(pipe)
    for number in range(2):
        run(pipe, options, steps)
        assert places(seen, number) == expected
    assert {s.run for s in seen} == {0, 1}
    assert {s.num_steps for s in seen} == {expected[-1][0] + 1}
    assert clock.notes() == []
    levels = [s.sigma for s in seen if s.run == 0]
    if sigmas == "fall":
        assert levels == sorted(levels, reverse=True) and levels[0] > levels[-1]
    else:
        assert set(levels) == {None}


def test_one_call_or_two_a_step():
    check(*wan(), both(4))
    check(*cogvideox(), one(4), sigmas="none")


def test_a_second_order_scheduler_has_a_step_for_each_row_of_its_table():
    check(*wan(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)), both(7))


@pytest.mark.parametrize("scheduler", [diffusers.CogVideoXDPMScheduler, diffusers.PNDMScheduler])
def test_schedulers_without_an_index(scheduler):
    """PNDM repeats its second timestep, which only the passes of a row tell apart."""
    pipe, options = cogvideox(scheduler(**({"skip_prk_steps": True} if "PNDM" in scheduler.__name__ else {})))
    assert not hasattr(pipe.scheduler, "step_index")
    pipe.scheduler.set_timesteps(4)
    check(pipe, options, one(len(pipe.scheduler.timesteps)), sigmas="none")


def test_repeated_timesteps_without_an_index_and_two_calls_a_step():
    pipe, options = wan()
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    clock, seen = watched(pipe)
    for _ in range(2):
        pipe.scheduler.set_timesteps(4)
        table = pipe.scheduler.timesteps.tolist()
        assert len(set(table)) < len(table) == 5
        denoise(pipe, options)
    assert places(seen, 0) == places(seen, 1) == both(5) and {s.num_steps for s in seen} == {5} and not clock.notes()


@pytest.mark.parametrize(("dtype", "distinct"), [(torch.bfloat16, 45), (torch.float16, 50)])
def test_timesteps_that_collide_when_they_are_rounded(dtype, distinct, tmp_path):
    pipe, options = kandinsky5(shift=10.0)
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path, dtype=dtype)
    pipe.scheduler.set_timesteps(50)
    assert len(set(pipe.scheduler.timesteps.to(dtype).tolist())) == distinct
    clock, seen = watched(pipe)
    run(pipe, options, 50)
    assert places(seen) == both(50) and {s.num_steps for s in seen} == {50} and not clock.notes()


def test_a_table_that_rises():
    check(*mochi(), one(4))


def test_an_inversion():
    """Flow matching backwards: the same sigmas from low to high, with guidance in two calls."""
    pipe, options = wan(diffusers.FlowMatchEulerDiscreteScheduler())
    clock, seen = watched(pipe)
    for _ in range(2):
        pipe.scheduler.set_timesteps(sigmas=[0.1, 0.3, 0.5, 0.7, 0.9])
        denoise(pipe, options)
    assert places(seen, 0) == places(seen, 1) == both(5) and not clock.notes()
    assert [s.sigma for s in seen[:10:2]] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


def test_frames_with_a_timestep_each():
    """The pipeline steps a copy of its scheduler for each frame; asynchronous, the highest timestep hardly moves."""
    check(*skyreels_diffusion_forcing(ar_step=0), both(4))
    pipe, options = skyreels_diffusion_forcing(ar_step=2, causal_block_size=1)
    clock, seen = watched(pipe)
    for number in range(2):
        run(pipe, options)
        assert places(seen, number) == both(12) and pipe.num_timesteps == 12
    assert {s.num_steps for s in seen} == {12} and not clock.notes() and {s.run for s in seen} == {0, 1}


def test_windows_of_a_long_video_are_runs():
    """Each window has its own steps, though the pipeline sets its scheduler's table once."""
    pipe, options = skyreels_diffusion_forcing(ar_step=0)
    more = {"num_frames": 33, "base_num_frames": 17, "overlap_history": 5}
    clock, seen = watched(pipe)
    run(pipe, options, **more)
    windows = {s.run for s in seen}
    assert len(windows) > 1
    for number in windows:
        assert places(seen, number) == both(4)
    assert not clock.notes()


def test_a_model_that_gets_a_noise_level_instead_of_the_timestep(monkeypatch):
    check(*cosmos2(monkeypatch), both(4), sigmas="none")


@pytest.mark.parametrize(("build", "expected"), [(helios, both(4)), (framepack, one(4))])
def test_a_table_for_each_chunk(build, expected):
    pipe, options = build()
    clock, seen = watched(pipe)
    run(pipe, options)
    assert places(seen, 0) == places(seen, 1) == expected and {s.run for s in seen} == {0, 1} and not clock.notes()


def test_two_transformers_count_as_one():
    pipe, options = wan(transformer_2=make_transformer(seed=1, num_layers=1), boundary_ratio=0.8)
    calls = []
    pipe.transformer_2.register_forward_pre_hook(lambda *_: calls.append(1))
    check(pipe, options, both(4))
    assert 0 < len(calls) < 16


def test_an_unconditional_pass_that_some_steps_skip():
    pipe, options = wan()
    clock, seen = watched(pipe)

    def drop_guidance(pipe, step, timestep, kwargs):
        pipe._guidance_scale = 1.0 if step >= 1 else 5.0
        return kwargs

    run(pipe, options, callback_on_step_end=drop_guidance)
    assert places(seen) == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond"), (2, "cond"), (3, "cond")]
    assert not clock.notes()


def test_a_scheduler_swapped_between_runs():
    pipe, options = wan()
    clock, seen = watched(pipe)
    run(pipe, options, 2)
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    run(pipe, options, 3)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    run(pipe, options, 3)
    assert [places(seen, n) for n in range(3)] == [both(2), both(5), both(3)] and not clock.notes()


def stop(pipe, step, timestep, kwargs):
    pipe._interrupt = True
    return kwargs


def own_loop(pipe, options, steps: int) -> None:
    pipe.scheduler.set_timesteps(steps)
    denoise(pipe, options)


@pytest.mark.parametrize("broken_off", [False, True])
@pytest.mark.parametrize("calls", [run, own_loop])
def test_two_pipelines_with_one_transformer_and_a_scheduler_each(broken_off, calls):
    """Outside of its calls the other's steps are counted from its timesteps, in runs of their own, and the report says
    so."""
    pipe, options = wan()
    other, _ = wan(diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0), transformer=pipe.transformer)
    clock, seen = watched(pipe)
    run(pipe, options, 8, **({"callback_on_step_end": stop} if broken_off else {}))
    pipe._interrupt = False
    for _ in range(2):
        calls(other, options, 20)
    run(pipe, options, 3)
    first, told = 1 if broken_off else 8, 20 if calls is run else None
    assert [places(seen, n) for n in range(4)] == [both(first), both(20), both(20), both(3)]
    assert [{s.num_steps for s in seen if s.run == n} for n in range(4)] == [{8}, {told}, {told}, {3}]
    outside = [note for note in clock.notes() if "outside the schedule" in note]
    assert len(outside) == (0 if calls is run else 2) and all("run 1" in n or "run 2" in n for n in outside)
    assert len(clock.notes()) == len(outside) + broken_off
    assert any("run 0: steps seen 1, expected 8" in note for note in clock.notes()) == broken_off


def test_a_scheduler_that_stands_still_is_not_the_one_that_runs(monkeypatch):
    """Cosmos sends no timesteps of its table, so the run of a loop of one's own with another one is known by a place
    that does not move."""
    pipe, options = cosmos2(monkeypatch)
    other, _ = cosmos2(monkeypatch)
    other.transformer = pipe.transformer
    clock, seen = watched(pipe)
    given = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *call: given.append(call[2]), with_kwargs=True)
    run(pipe, options, 8, callback_on_step_end=stop)
    run(other, options, 5)
    hook.remove()
    assert places(seen, 0) == both(1) and places(seen, 1) == both(5) and {s.num_steps for s in seen[2:]} == {5}
    assert [note[:30] for note in clock.notes()] == ["run 0: steps seen 1, expected "]
    run(pipe, options, 8, callback_on_step_end=stop)
    with torch.no_grad():
        for arguments in given[2:]:
            pipe.transformer(**arguments)
    assert {s.branch for s in seen} == {"cond", "uncond"} and places(seen, 3) == both(4)
    assert "run 2: steps seen 2, expected 8" in clock.notes()[1] and "outside the schedule" in clock.notes()[2]


@pytest.mark.parametrize("calls", [run, own_loop])
def test_a_pipeline_that_never_ran_beside_one_that_does(calls):
    pipe, options = wan(diffusers.FlowMatchEulerDiscreteScheduler())
    other, _ = wan(diffusers.FlowMatchEulerDiscreteScheduler(), transformer=pipe.transformer)
    clock, seen = watched(pipe)
    calls(other, options, 4)
    assert places(seen) == both(4) and {s.num_steps for s in seen} == {4 if calls is run else None}
    assert [note[:28] for note in clock.notes()] == ([] if calls is run else ["run 0: called outside the sc"])


def test_a_transformer_alone():
    """Falling and rising timesteps count, and a turn starts a run."""
    transformer = make_transformer(num_layers=1)
    clock, seen = StepClock(transformer), []
    listen(clock, seen, transformer)
    latents, text = torch.randn(1, 4, 1, 8, 8), torch.randn(1, 6, 16)
    with torch.no_grad():
        for values in ((900.0, 500.0, 100.0), (900.0, 500.0), (100.0, 500.0, 900.0), (100.0, 500.0)):
            for value in values:
                for _ in range(2):
                    transformer(latents, torch.tensor([value]), text)
    # 500 -> 100 goes on falling: without a scheduler a new run looks no different there.
    assert places(seen, 0) == both(3) and places(seen, 1) == both(3)
    assert {s.run for s in seen} == {0, 1, 2, 3} and not clock.notes()
    assert places(seen, 2) == both(2) and places(seen, 3) == both(2)


def test_a_run_broken_off_is_told(caplog):
    pipe, options = wan()

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step >= 1
        return kwargs

    clock, _ = watched(pipe)
    run(pipe, options, callback_on_step_end=stop)
    told = "it was interrupted or failed, or its loop leaves steps out; later runs are counted anew"
    assert clock.notes() == [f"run 0: steps seen 2, expected 4: {told}"]
    pipe._interrupt = False
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run(pipe, options)
    assert len(clock.notes()) == 1
    assert [r.getMessage() for r in caplog.records if "steps seen" in r.getMessage()] == clock.notes()


def test_a_loop_that_never_steps_its_scheduler():
    """Custom loops may integrate themselves: the places are then found by value."""
    pipe, options = wan(make_scheduler())
    clock, seen = watched(pipe)
    for _ in range(2):
        pipe.scheduler.set_timesteps(5)
        denoise(pipe, options, first=2, step=False)
    assert places(seen, 0) == places(seen, 1) == both(3) and {s.num_steps for s in seen} == {3} and not clock.notes()


def test_an_empty_timestep_is_refused():
    with pytest.raises(ValueError, match=r"transformer was called with an empty timestep, of shape \[0\]"):
        StepClock(None).observe(torch.zeros(0), "transformer", ("cond",))


def test_the_last_steps_of_a_second_order_scheduler_stay_dense():
    pipe, options = wan(diffusers.FlowMatchHeunDiscreteScheduler())
    schedule = DenseSchedule(first_steps=1, last_steps=2)
    with accelerate(pipe, SVG(density=0.5, sink=False), schedule=schedule) as handle:
        run(pipe, options)
        report = handle.report()
    reasons = {record.step: record.reason for record in report.records}
    assert reasons == {0: "first steps", 1: "", 2: "", 3: "", 4: "", 5: "last steps", 6: "last steps"}
    assert not [note for note in report.notes if "steps seen" in note]


HEUN = (diffusers.FlowMatchHeunDiscreteScheduler, diffusers.HeunDiscreteScheduler)


@pytest.mark.parametrize("scheduler", [None, *HEUN])
def test_video_to_video_counts_the_steps_that_are_run(scheduler):
    """Half of 6 steps; Heun has two rows for each step but the first, and starts at the second of two equal ones."""
    pipe = diffusers.WanVideoToVideoPipeline.from_pretrained(demo.path())
    pipe.vae_scale_factor_spatial = pipe.vae.config.scale_factor_spatial
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler()
    clock, seen = watched(pipe)
    size = {"height": 64, "width": 64, "strength": 0.5, "guidance_scale": 1.0}
    for _ in range(2):
        run(pipe, {"video": list(torch.rand(9, 3, 64, 64)), "prompt": "a red circle", **size}, steps=6)
    count = 3 if scheduler is None else 5
    assert [(s.run, s.step, s.num_steps) for s in seen] == [(r, step, count) for r in range(2) for step in range(count)]
    assert clock.notes() == []


@pytest.mark.parametrize("scheduler", HEUN)
def test_a_loop_that_starts_at_the_second_of_two_equal_rows(scheduler):
    pipe, options = wan(scheduler())
    clock, seen = watched(pipe)
    for _ in range(2):
        pipe.scheduler.set_timesteps(5)
        rows = pipe.scheduler.timesteps.tolist()
        assert rows[3] == rows[4] and len(rows) == 9
        denoise(pipe, options, first=4)
    assert places(seen, 0) == places(seen, 1) == both(5) and {s.num_steps for s in seen} == {5} and not clock.notes()


class Rounding(diffusers.WanPipeline):
    """Sends each row rounded and for both samples, as HunyuanVideo 1.5 does: no view of the table."""

    @torch.no_grad()
    def __call__(self, between=lambda step: None):
        self.scheduler.set_timesteps(6)
        text, latents = torch.ones(2, 6, 16), torch.ones(2, 4, 2, 4, 4)
        for step, t in enumerate(self.scheduler.timesteps):
            t2 = t.expand(2).to(torch.bfloat16)
            for _ in range(2):
                noise = self.transformer(latents, t2, text, return_dict=False)[0]
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
            between(step)


@pytest.fixture
def values(monkeypatch) -> list[float]:
    """The timesteps that were read."""
    seen, read = [], scheduler_table._read

    def told(timestep):
        seen.append(timestep[0].item())
        return read(timestep)

    monkeypatch.setattr(scheduler_table, "_read", told)
    return seen


def test_rounded_rows_are_read_in_the_first_step_alone(values):
    pipe = make_pipe(Rounding)
    clock, seen = StepClock(pipe), []
    listen(clock, seen, pipe.transformer)
    for number in range(2):
        pipe()
        assert places(seen, number) == both(6) and clock.notes() == []
    first = pipe.scheduler.timesteps[0].bfloat16().item()
    assert values == [first] * 4


def test_the_pass_of_another_pipeline_between_two_steps_is_its_own(values):
    pipe = make_pipe(Rounding)
    other = Rounding.from_pipe(pipe, scheduler=make_scheduler())
    clock, seen = StepClock(pipe), []
    listen(clock, seen, pipe.transformer)
    pipe(between=lambda step: other() if step == 2 else None)
    assert len(seen) == 24 and places(seen, 0) == both(3) and places(seen, 1) == both(6)
    assert [(s.run, s.step) for s in seen[18:]] == [(2, step) for step in (0, 0, 1, 1, 2, 2)]
    rows = pipe.scheduler.timesteps.bfloat16().tolist()
    assert sorted(set(values), reverse=True) == [rows[0], rows[3]]  # the first of each run
