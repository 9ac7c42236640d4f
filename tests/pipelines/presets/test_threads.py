"""Pipelines that share a transformer, each in a thread of its own."""

from __future__ import annotations

import contextlib
import threading

import pytest
from diffusers import WanPipeline
from eager_caches import EAGER
from tiny_wan import generate

import vidaccel
from vidaccel import Preset, Tangent

GUIDED = {"every": 3, "first_steps": 2}
OF_DIFFUSERS = {name: Preset(cache=EAGER[name]) for name in ("first_block", "magcache", "seacache", "taylorseer")}
PRESETS = {
    "sparse": Preset(method=Tangent(density=0.6, q_clusters=2, k_clusters=2)),
    "forecast": Preset(cache=EAGER["forecast"]),
    "guidance": Preset(guidance_cache=GUIDED),
}
ONE_AT_A_TIME = "transformer is called by two threads at once"


class Elsewhere:
    """Calls a pipeline in another thread, and waits for it."""

    def __init__(self, pipe: WanPipeline) -> None:
        self._pipe = pipe
        self.errors: list[str] = []
        self.made: list = []

    def __call__(self) -> None:
        thread = threading.Thread(target=self._call)
        thread.start()
        thread.join()

    def _call(self) -> None:
        try:
            self.made.append(generate(self._pipe, steps=6))
        except RuntimeError as error:
            self.errors.append(str(error))

    def after_each_step(self, pipe: WanPipeline, step: int, timestep: object, tensors: dict) -> dict:
        self()
        return {}


@contextlib.contextmanager
def in_each_pass(pipe: WanPipeline, elsewhere: Elsewhere):
    hook = pipe.transformer.patch_embedding.register_forward_hook(lambda *_: elsewhere())
    yield
    hook.remove()


@pytest.mark.parametrize("name", [*PRESETS, *OF_DIFFUSERS])
def test_runs_whose_steps_take_turns_are_refused(pair, name):
    pipe, other = pair
    elsewhere = Elsewhere(other)
    with vidaccel.apply(pipe, {**PRESETS, **OF_DIFFUSERS}[name]):
        expected = generate(pipe, steps=6)
        # After the last step no pass comes: a pipeline may decode while another one makes its steps.
        assert generate(pipe, steps=6, callback_on_step_end=elsewhere.after_each_step).equal(expected)
        assert len(elsewhere.errors) == 5 and all(text.startswith(ONE_AT_A_TIME) for text in elsewhere.errors)
        assert len(elsewhere.made) == 1 and generate(pipe, steps=6).equal(expected)


@pytest.mark.parametrize("name", PRESETS)
def test_a_call_that_is_refused_does_not_end_the_run_that_goes_on(pair, name):
    """It is of the pipeline that has the preset: its marks, and with a method its progress bar, tell the clock of both.
    The bar forgets what the run remembers; the marks begin a call, of which all later runs would be."""
    pipe, other = pair
    elsewhere = Elsewhere(pipe)

    def while_it_goes_on(pipe: WanPipeline, step: int, *rest) -> dict:
        return elsewhere.after_each_step(pipe, step, *rest) if step < 5 else {}

    with vidaccel.apply(pipe, PRESETS[name]) as handle:
        expected = generate(other, steps=6)
        assert generate(other, steps=6, callback_on_step_end=while_it_goes_on).equal(expected)
        assert len(elsewhere.errors) == 5 and all(text.startswith(ONE_AT_A_TIME) for text in elsewhere.errors)
        for _ in range(2):
            assert generate(other, steps=6).equal(expected)
        report = handle.report()
        assert [len(report.last().steps), len({step.call for step in report.steps})] == [6, 4]


@pytest.mark.parametrize("name", PRESETS)
def test_a_thread_that_comes_in_the_midst_of_a_pass_is_refused(pair, name):
    pipe, other = pair
    elsewhere = Elsewhere(other)
    with vidaccel.apply(pipe, PRESETS[name]):
        expected = generate(pipe, steps=6)
        with in_each_pass(pipe, elsewhere):
            assert generate(pipe, steps=6).equal(expected)
    assert elsewhere.errors and all(text.startswith(ONE_AT_A_TIME) for text in elsewhere.errors)


def test_without_a_cache_or_a_method_only_the_account_is_mixed(pair):
    pipe, other = pair
    elsewhere = Elsewhere(other)
    plain = generate(pipe, steps=6)
    with vidaccel.apply(pipe, Preset()) as handle:
        assert generate(pipe, steps=6, callback_on_step_end=elsewhere.after_each_step).equal(plain)
        assert len(elsewhere.made) == 6 and all(made.equal(plain) for made in elsewhere.made)
        (note,) = handle.report().notes
        assert note.startswith("two threads made passes of the transformer at once")
        handle.reset()
        generate(pipe, steps=6)
        assert not handle.report().notes


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_a_pass_whose_branch_another_thread_changed_ends_both(pair, name):
    """diffusers' caches have one branch at a time, and pipelines tell it before their pass can be refused."""
    pipe, other = pair
    elsewhere = Elsewhere(other)
    with vidaccel.apply(pipe, OF_DIFFUSERS[name]):
        expected = generate(pipe, steps=6)
        with in_each_pass(pipe, elsewhere), pytest.raises((RuntimeError, ValueError)):
            generate(pipe, steps=6)
        assert elsewhere.errors and all(text.startswith(ONE_AT_A_TIME) for text in elsewhere.errors)
        assert generate(pipe, steps=6).equal(expected)


def test_guidance_cache_alone_refuses_too(pair):
    pipe, other = pair
    elsewhere = Elsewhere(other)
    with vidaccel.guidance_cache(pipe, **GUIDED):
        expected = generate(pipe, steps=6)
        assert generate(pipe, steps=6, callback_on_step_end=elsewhere.after_each_step).equal(expected)
    assert len(elsewhere.errors) == 5 and all(text.startswith(ONE_AT_A_TIME) for text in elsewhere.errors)


def test_a_run_that_was_broken_off_is_in_nobodys_way(pair):
    pipe, other = pair

    def stop(*_) -> dict:
        raise KeyboardInterrupt

    elsewhere = Elsewhere(other)
    with vidaccel.apply(pipe, PRESETS["forecast"]):
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, steps=6, callback_on_step_end=stop)
        elsewhere()
    assert len(elsewhere.made) == 1 and not elsewhere.errors
