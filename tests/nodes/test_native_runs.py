"""Sparse attention in native models from step to step, branch to branch and run to run, without ComfyUI."""

from __future__ import annotations

import pytest
import torch
from native_calls import (
    BATCHED,
    HEADS,
    RECORDED,
    SEPARATE,
    Executor,
    expected,
    run,
    session_of,
    step,
)

from vidaccel import SVG, SVG2, Radial
from vidaccel.nodes.native.sampling import DensePart


@pytest.mark.parametrize("method", [SVG2(density=0.6), SVG(density=0.6)])
@pytest.mark.parametrize("name", RECORDED)
def test_branches_in_one_batch_equal_branches_apart(name, method):
    recorded = RECORDED[name]
    batched, separate = run(session_of(method), recorded, BATCHED), run(session_of(method), recorded, SEPARATE)
    for key, value in batched.items():
        torch.testing.assert_close(value, separate[key], msg=str(key))


def test_two_prompts_of_one_side_have_a_state_each():
    session = session_of()
    options = {"cond_or_uncond": [1, 0, 0], "uuids": ["n", "p", "q"]}
    step(session, Executor(RECORDED["wan"], 3), **options)
    assert {r.branch for r in session.report().records} == {"cond", "cond #2", "uncond"}
    apart = session_of()
    for entry, (kind, uuid) in enumerate(zip(*options.values(), strict=True)):
        step(apart, Executor(RECORDED["wan"], seeds=[entry]), cond_or_uncond=[kind], uuids=[uuid])
    assert len(apart._engines[RECORDED["wan"].layout].memory.calls) == 6


def test_a_latent_batch_stays_together_within_a_branch():
    session = session_of()
    step(session, Executor(RECORDED["wan"], 4), cond_or_uncond=[0, 1])
    memory = session._engines[RECORDED["wan"].layout].memory.calls
    assert memory and all((2, HEADS) in key for key in memory)


def test_a_run_begins_without_the_state_of_the_last():
    wan = RECORDED["wan"]
    session, fresh = session_of(), session_of()
    run(session, wan, [{"seeds": [7], "options": {}}])
    assert not session._engines[wan.layout].memory.calls  # gigabytes on a large model
    first = run(fresh, wan, BATCHED)
    for key, value in run(session, wan, BATCHED).items():
        assert value.equal(first[key])
    assert session.report().runs() == [0, 1]


def test_an_interrupted_run_leaves_nothing_behind():
    class Interrupted(Executor):
        def __call__(self, *args, **kwargs):
            super().__call__(*args, **kwargs)
            raise KeyboardInterrupt

    wan, session = RECORDED["wan"], session_of()
    session.begin()
    with pytest.raises(KeyboardInterrupt):
        step(session, Interrupted(wan, seeds=[5]), sigma=1.0)
    session.end()
    fresh = run(session_of(), wan, BATCHED)
    for key, value in run(session, wan, BATCHED).items():
        assert value.equal(fresh[key])


def test_another_resolution_has_its_own_plan():
    session = session_of(lambda layout: Radial.for_density(layout, 0.7))
    for name in ("wan", "wan odd size", "wan"):
        recorded = RECORDED[name]
        session.begin()
        played = step(session, Executor(recorded))
        method = Radial.for_density(recorded.layout, 0.7)
        for place in recorded.video:
            torch.testing.assert_close(
                played.outputs[place], expected(method, *played.inputs[place], recorded.layout, flat=True)
            )
    assert list(session._engines) == [RECORDED["wan odd size"].layout, RECORDED["wan"].layout]  # the last one last
    assert session.report().runs() == [0, 1, 2]


def test_steps_by_percentage_of_the_schedule():
    session = session_of(dense=DensePart(start=0.25, end=0.25))
    run(session, RECORDED["wan"], BATCHED)
    report = session.report()
    assert [density == 1 for density in report.density_by_step().values()] == [True, False, False, True]
    assert {r.num_steps for r in report.records} == {4}
    assert report.dense_reasons() == {"dense_start_percent": 4, "dense_end_percent": 4}


def test_steps_are_counted_without_a_table_of_sigmas():
    session = session_of()
    session.begin()
    for sigma in (0.9, 0.9, 0.4):
        step(session, Executor(RECORDED["wan"]), sigma, sample_sigmas=None)
    assert [r.step for r in session.report().records] == [0, 0, 0, 0, 1, 1]
