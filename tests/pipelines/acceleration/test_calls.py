"""Videos that are made chunk by chunk: all runs of a call of the pipeline belong together in the report."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanPipeline
from tiny_pipelines import helios, run
from tiny_wan import generate, make_pipe

import vidaccel
from vidaccel import DenseSchedule, Radial
from vidaccel.attention.account import records
from vidaccel.pipelines.presets import Preset

METHOD = Radial(8, schedule=DenseSchedule())


@pytest.fixture
def chunked():
    torch.manual_seed(0)
    return helios()


def calls(report) -> list[tuple[int, int]]:
    return sorted({(r.call, r.run) for r in report.records})


def test_the_last_call_is_the_whole_video(chunked):
    pipe, options = chunked
    with vidaccel.accelerate(pipe, METHOD) as handle:
        run(pipe, options, 2)
        chunks = len(handle.report().runs())
        assert chunks > 1 and handle.report().last() == handle.report()
        run(pipe, options, 2)
        report = handle.report()
        assert calls(report) == [(n // chunks, n) for n in range(2 * chunks)]
        assert report.last().runs() == list(range(chunks, 2 * chunks))
    assert not {"check_inputs", "maybe_free_model_hooks"} & vars(pipe).keys()


def test_records_are_kept_by_calls_and_a_call_is_whole(chunked, monkeypatch):
    pipe, options = chunked
    monkeypatch.setattr(records, "KEPT_RUNS", 2)
    with vidaccel.accelerate(pipe, METHOD) as handle:
        for _ in range(3):
            run(pipe, options, 1)
        report = handle.report()
        chunks = len(report.last().runs())
        assert calls(report) == [(n // chunks, n) for n in range(chunks, 3 * chunks)]
        assert f"records before run {chunks} were dropped" in str(report)
        monkeypatch.setattr(records, "KEPT_RECORDS", 3)  # fewer than a call has
        run(pipe, options, 1)
        assert calls(handle.report()) == [(3, n) for n in range(3 * chunks, 4 * chunks)]


def test_a_call_that_failed_and_a_loop_of_ones_own_are_calls_too():
    pipe = make_pipe()
    with vidaccel.accelerate(pipe, METHOD) as handle:
        hook = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(pipe)
        hook.remove()
        generate(pipe, steps=1)
        latents, text = torch.randn(1, 4, 3, 8, 12), torch.randn(1, 5, 16)
        for _ in range(2):
            pipe.scheduler.set_timesteps(1)
            with torch.no_grad():
                pipe.transformer(latents, pipe.scheduler.timesteps, text)
        copied = copy.deepcopy(pipe)
        generate(copied, steps=1)
        assert calls(handle.report()) == [(n, n) for n in range(4)]


def test_a_shallow_copy_runs_its_own_methods_and_gets_them_back():
    freed = []

    class Told(WanPipeline):
        def maybe_free_model_hooks(self):
            freed.append(self)

    def marks(pipe):
        return {"check_inputs", "maybe_free_model_hooks", "progress_bar"} & vars(pipe).keys()

    pipe = make_pipe(Told)
    handle = vidaccel.accelerate(pipe, METHOD)
    twin, other = copy.copy(pipe), copy.copy(pipe)
    generate(twin)
    generate(pipe)
    assert freed == [twin, pipe] and calls(handle.report()) == [(0, 0), (1, 1)]
    handle.remove()
    assert not marks(pipe) and len(marks(twin)) == 3
    generate(twin)
    vidaccel.restore(other)
    assert freed[2:] == [twin] and not marks(twin) and not marks(other)
    handle = vidaccel.accelerate(pipe, METHOD)
    twin, other = copy.copy(pipe), copy.copy(pipe)
    vidaccel.restore(twin)  # they have one transformer
    assert not marks(pipe) and not marks(twin)
    with vidaccel.accelerate(other, METHOD) as handle:
        generate(other)
        generate(other)
        assert freed[3:] == [other] * 2 and calls(handle.report()) == [(0, 0), (1, 1)]
    assert not marks(other)


def test_the_report_of_the_last_call_says_nothing_of_those_before():
    pipe = make_pipe()
    with vidaccel.accelerate(pipe, METHOD, min_tokens=50) as handle:
        generate(pipe, size=32)
        generate(pipe)
        report = handle.report()
    assert [note for note in report.notes if note not in report.last().notes] == [
        "all calls of a forward pass stay dense: min_tokens 50, above the video's 20 tokens"
    ]
    assert any("backend auto" in note for note in report.last().notes)
    with vidaccel.apply(pipe, Preset(method=METHOD, num_inference_steps=4)) as handle:
        generate(pipe, 5, callback_on_step_end=lambda pipe, step, t, kw: setattr(pipe, "_interrupt", step == 1) or kw)
        pipe._interrupt = False
        generate(pipe)
        account = handle.report()
    (earlier,) = (note for note in account.notes if note not in account.last().notes)
    assert earlier.startswith("run 0: steps seen 2, expected 5")
    assert len(account.own_notes) == 1 and account.last().own_notes == account.own_notes


def test_the_account_of_a_preset_is_of_the_whole_video_too(chunked):
    pipe, options = chunked
    with vidaccel.apply(pipe, Preset(method=METHOD)) as handle:
        for _ in range(2):
            run(pipe, options, 2)
        account = handle.report().last()
    chunks = len(account.attention.runs())
    assert account.runs() == account.attention.runs() == list(range(chunks, 2 * chunks))
    assert chunks > 1 and account.counts()["steps"] == 2 * chunks
    assert not {"check_inputs", "maybe_free_model_hooks"} & vars(pipe).keys()
