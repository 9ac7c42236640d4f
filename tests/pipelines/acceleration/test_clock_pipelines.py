"""The step clock in the denoising loops of real pipelines: each evaluation of the model is counted once, in its run."""

from __future__ import annotations

import diffusers
import pytest
import tiny_pipelines
import torch
from tiny_pipelines import watch
from tiny_wan import generate, make_pipe, make_scheduler

from vidaccel import SVG, DenseSchedule, accelerate

BOTH = ("cond", "uncond")


def seen_in(made, steps: int = 4):
    """(run, step, branch) of every pass, and the clock; every pass says how many steps there are."""
    pipe, inputs = made
    clock, seen = watch(pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe(**inputs, num_inference_steps=steps, output_type="latent")
    return [(s.run, s.step, s.branch) for s in seen], [s.num_steps for s in seen], clock, seen


def each(steps: int, branches=BOTH, run: int = 0) -> list[tuple[int, int, str]]:
    return [(run, step, branch) for step in range(steps) for branch in branches]


@pytest.mark.parametrize(("scale", "branches"), [(5.0, BOTH), (1.0, ("cond",))])
def test_a_second_order_scheduler_evaluates_each_row_of_its_table(scale, branches):
    made = tiny_pipelines.wan(diffusers.FlowMatchHeunDiscreteScheduler(), guidance_scale=scale)
    passes, counts, clock, _ = seen_in(made, 4)
    assert passes == each(7, branches)  # 4 steps of two evaluations, the last of one
    assert set(counts) == {7} and not clock.notes


def test_the_last_steps_of_a_second_order_scheduler_stay_dense():
    pipe = make_pipe(scheduler=diffusers.FlowMatchHeunDiscreteScheduler())
    schedule = DenseSchedule(first_steps=1, last_steps=2)
    with accelerate(pipe, SVG(density=0.5, sink=False), schedule=schedule) as handle:
        generate(pipe, steps=4)
        records = handle.report().records
    reasons = {record.step: record.reason for record in records}
    assert reasons == {0: "first steps", 1: "", 2: "", 3: "", 4: "", 5: "last steps", 6: "last steps"}
    assert not [note for note in handle.report().notes if "steps seen" in note]


def test_timesteps_that_collide_in_half_precision():
    """Kandinsky 5 casts them to bfloat16, in which 50 steps at shift 10 have 45 values."""
    with torch.autocast("cpu", torch.bfloat16):
        passes, counts, clock, _ = seen_in(tiny_pipelines.kandinsky5(shift=10.0), 50)
    assert passes == each(50)
    assert set(counts) == {50} and not clock.notes


def test_a_table_that_rises():
    passes, counts, clock, seen = seen_in(tiny_pipelines.mochi(), 5)
    assert passes == each(5, ("cond",))  # both branches are in one batch
    levels = [step.sigma for step in seen]
    assert levels == sorted(levels, reverse=True) and levels[0] == 1.0  # noise, although its sigmas rise
    assert set(counts) == {5} and not clock.notes


def test_frames_with_timesteps_of_their_own():
    """The highest timestep is the same for many steps, and the scheduler never steps: copies of it do."""
    made = tiny_pipelines.skyreels_diffusion_forcing(ar_step=2, causal_block_size=1)
    passes, counts, clock, _ = seen_in(made, 4)
    steps = made[0].num_timesteps
    assert steps > 4 and passes == each(steps)
    assert set(counts[2:]) == {steps} and not clock.notes
    passes, counts, clock, _ = seen_in(tiny_pipelines.skyreels_diffusion_forcing(ar_step=0), 4)
    assert passes == each(4) and set(counts) == {4} and not clock.notes


def test_windows_of_diffusion_forcing_are_runs():
    """A long video is made window by window, under one table."""
    more = {"num_frames": 25, "base_num_frames": 13, "overlap_history": 5, "addnoise_condition": 0, "ar_step": 0}
    passes, _, _, _ = seen_in(tiny_pipelines.skyreels_diffusion_forcing(**more), 3)
    assert passes == [*each(3, run=0), *each(3, run=1), *each(3, run=2)]


def test_a_model_that_is_given_a_noise_level():
    made = tiny_pipelines.cosmos()
    passes, counts, clock, seen = seen_in(made, 4)
    assert passes == each(4)
    assert set(counts) == {4} and not clock.notes
    assert {step.sigma for step in seen} == {None}  # its levels go up to 80


def test_a_video_made_chunk_by_chunk_has_a_run_of_each():
    passes, counts, clock, _ = seen_in(tiny_pipelines.helios(), 3)
    assert passes == [*each(3, run=0), *each(3, run=1)]
    assert set(counts) == {3} and not clock.notes


@pytest.mark.parametrize("first", [True, False], ids=["after its own run", "before any"])
def test_another_pipeline_with_a_scheduler_of_its_own(first):
    """Steps are right all the same, their number is unknown, and the report says why."""
    pipe = make_pipe()
    other = make_pipe(transformer=pipe.transformer, scheduler=make_scheduler())
    with accelerate(pipe, SVG(density=0.5, sink=False), schedule=DenseSchedule(first_steps=2)) as handle:
        if first:
            generate(pipe, steps=3)
        handle.reset()
        generate(other, steps=4)
        generate(other, steps=4)
        foreign = handle.report()
        runs = foreign.runs()[-2:]
        for run in runs:
            found = [(r.step, r.reason) for r in foreign.records if r.run == run and r.layer == 0]
            assert found == [(s, "first steps" if s < 2 else "") for s in range(4) for _ in BOTH]
        assert {r.num_steps for r in foreign.records if r.run == runs[-1]} == {None}
        assert any("UniPCMultistepScheduler stands still" in note for note in foreign.notes)
        generate(pipe, steps=3)  # its own scheduler counts again
        last = handle.report().last()
        assert {r.num_steps for r in last.records} == {3} and {r.step for r in last.records} == {0, 1, 2}


def test_a_fraction_of_steps_that_nobody_knows_is_an_error():
    pipe = make_pipe()
    other = make_pipe(transformer=pipe.transformer, scheduler=make_scheduler())
    with accelerate(pipe, SVG(density=0.5, sink=False), schedule=DenseSchedule(first_steps=0.5)):
        generate(pipe, steps=3)
        with pytest.raises(ValueError, match=r"first_steps=0\.5 is a fraction of a number of steps that is unknown"):
            generate(other, steps=4)


def test_a_transformer_alone_counts_in_either_direction():
    pipe = make_pipe()
    _, seen = watch(pipe)
    pipe.scheduler = None
    inputs = {"hidden_states": torch.randn(1, 4, 3, 8, 8), "encoder_hidden_states": torch.randn(1, 6, 16)}
    for timesteps in ((900, 600, 300), (900, 600, 300), (0, 200, 400)):
        for t in timesteps:
            for _ in BOTH:
                pipe.transformer(timestep=torch.tensor([t]), **inputs)
    found = [(s.run, s.step, s.branch) for s in seen]
    assert found[:12] == [*each(3, run=0), *each(3, run=1)]
    # The step down to 0 looks like one more step; what rises after it is another run.
    assert found[12:] == [*((1, 3, branch) for branch in BOTH), *each(2, run=2)]


def test_a_run_that_is_broken_off_is_not_counted_in_silence():
    pipe = make_pipe()

    def stop(pipe, step, timestep, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return {}

    with accelerate(pipe, SVG(density=0.5, sink=False), schedule=DenseSchedule()) as handle:
        generate(pipe, steps=4)
        assert not handle.report().notes or not any("steps seen" in note for note in handle.report().notes)
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, steps=4, callback_on_step_end=stop)
        notes = [note for note in handle.report().notes if "steps seen" in note]
        assert len(notes) == 1 and notes[0].startswith("run 1: steps seen 2, expected 4")
        generate(pipe, steps=2)
        assert [n for n in handle.report().notes if "steps seen" in n] == notes


def test_video_to_video_counts_what_is_run():
    from diffusers import WanVideoToVideoPipeline

    from vidaccel import demo

    pipe = WanVideoToVideoPipeline.from_pretrained(demo.path())
    pipe.vae_scale_factor_spatial = pipe.vae.config.scale_factor_spatial
    pipe.set_progress_bar_config(disable=True)
    _, seen = watch(pipe)
    frames = torch.rand(9, 3, 64, 64)
    pipe(video=list(frames), prompt="a red circle", height=64, width=64, num_inference_steps=6, strength=0.5,
         guidance_scale=1.0, output_type="latent")  # fmt: skip
    assert [(s.run, s.step, s.num_steps) for s in seen] == [(0, step, 3) for step in range(3)]
