"""From how many tokens sparse attention pays: the search, the file of this machine, and who uses it."""

from __future__ import annotations

import json
import logging
import shlex

import pytest
import torch
from diffusers import WanPipeline
from huggingface_hub import constants
from typer.testing import CliRunner

import vidaccel
from vidaccel import demo
from vidaccel.cli import app
from vidaccel.generation.errors import BadInput
from vidaccel.generation.job import prepare
from vidaccel.generation.requests.settings import Settings
from vidaccel.generation.requests.sparse import Sparse
from vidaccel.generation.tuning.break_even import find_break_even, timer
from vidaccel.generation.tuning.store import store
from vidaccel.pipelines.break_even import BreakEven, Key, Limit, limit, stored

PROMPT = "a red circle moves left on a grey background"
SMALL = Settings(PROMPT, frames=9, height=64, width=64)


class Machine:
    """Dense takes `(tokens / 1024)**2` seconds of a clock of its own, sparse a fifth of that and `planning`."""

    def __init__(self, planning: float) -> None:
        self.planning, self.now, self.asked = planning, 0.0, []

    def times(self, tokens: int) -> tuple[float, float]:
        dense = (tokens / 1024) ** 2
        pair = dense, 0.2 * dense + self.planning
        self.now += sum(pair)
        self.asked.append(tokens)
        return pair

    def find(self, **more) -> BreakEven:
        return find_break_even(self.times, clock=lambda: self.now, **more)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture
def key(cache) -> Key:
    """Of the built-in model on this machine."""
    return Key.here(3, 64, torch.device("cpu"), torch.float32)


def test_the_gap_is_halved_to_where_sparse_pays():
    machine = Machine(planning=20.0)  # pays from 0.77 (n / 1024)**2 = 20 up: 5,219 tokens
    found = machine.find(seconds=1e6)
    assert machine.asked == [1024, 2048, 4096, 8192, 8192, 5888, 4864]
    assert (found.tokens, found.dense_until) == (5888, 4864)
    assert "from 5,888 tokens; dense is as fast up to 4,864" in found.in_words()


def test_where_the_shortest_pays_already_nothing_is_halved():
    machine = Machine(planning=0.0)
    found = machine.find(seconds=1e6)
    assert machine.asked == [1024, 1024] and (found.tokens, found.dense_until) == (1024, 0)


def test_no_length_is_begun_that_does_not_fit_into_the_time():
    machine = Machine(planning=1e3)
    found = machine.find(seconds=8_000)
    # After 8,192 tokens 4,104 s of the clock are gone, and 16,384 are foreseen to take four times 1,077 s.
    assert machine.asked == [1024, 2048, 4096, 8192] and found.tokens is None and found.dense_until == 8192
    assert found.in_words().startswith("No gain here: dense is faster up to 8,192 tokens")
    # Two are measured in any case.
    assert Machine(planning=1e3).find(seconds=1e-3).dense_until == 2048


def test_one_slow_call_of_dense_is_no_gain():
    answers = iter([(1.0, 2.0), (9.0, 4.0), (3.0, 4.0), (10.0, 5.0), (10.0, 5.0), (1.0, 2.0), (1.0, 2.0)])
    found = find_break_even(lambda tokens: next(answers), seconds=1e6)
    assert [tokens for tokens, *_ in found.points][:5] == [1024, 2048, 2048, 4096, 4096]
    assert found.tokens == 4096


def test_real_calls_are_timed():
    times = timer(2, 16, torch.device("cpu"), torch.float32)
    assert all(seconds > 0 for seconds in times(1024))


# -- the file ----------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_found_again_and_by_nobody_else(key, cache):
    assert stored(key) is None
    found = BreakEven(5888, 4864, ((1024, 1.0, 2.0),))
    file = store(key, found)
    assert file.is_relative_to(cache) and stored(key) == found
    for other in (
        Key.here(3, 64, torch.device("cpu"), torch.bfloat16),
        Key.here(3, 128, torch.device("cpu"), torch.float32),
        Key.here(3, 64, torch.device("cpu"), torch.float32, "svg2"),
    ):
        assert stored(other) is None
    assert [f.name for f in file.parent.iterdir()] == [file.name]  # nothing half written


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"key": {}, "break_even": {}}),
        None,  # the key of this machine, and nonsense for it
    ],
)
def test_a_file_that_cannot_be_read_is_said_once_and_counts_as_none(key, caplog, content):
    store(key, BreakEven(5888, 4864))
    broken = {"key": vars(key), "break_even": {"tokens": -3, "dense_until": 0, "points": []}}
    key.file.write_text(json.dumps(broken) if content is None else content)
    with caplog.at_level(logging.WARNING):
        assert stored(key) is None
    assert len(caplog.records) == 1 and "--dtype float32 --threads 1` measures it anew" in caplog.text
    store(key, BreakEven(None, 2048))
    assert stored(key) == BreakEven(None, 2048)


def test_the_command_that_is_advised_measures_what_is_looked_for(cache, monkeypatch):
    """With other threads than torch's own, as after `generate --threads 2`."""
    monkeypatch.setattr("vidaccel.generation.tuning.api.timer", lambda *_: lambda tokens: (2.0, 1.0))
    torch.set_num_threads(2)
    try:
        key = Key.here(3, 64, torch.device("cpu"), torch.float32)
        command = limit(key, "demo").why.split("`")[1]
        torch.set_num_threads(1)
        result = CliRunner().invoke(app, shlex.split(command)[1:])
        assert result.exit_code == 0, (result.output, result.exception)
        assert stored(key) == BreakEven(1024, 0, ((1024, 2.0, 1.0),) * 2)
    finally:
        torch.set_num_threads(1)


def test_the_limit(key):
    how = f"--device {key.device} --dtype {key.dtype} --threads {torch.get_num_threads()}"
    command = f"`vidaccel break-even --model some/model {how}`"
    assert limit(key, "some/model") == Limit(
        8192, f"8,192 tokens are a fixed default: {command} measures it on this machine."
    )
    assert f"--model '/my models/wan' {how}`" in limit(key, "/my models/wan").why
    other = Key.here(40, 128, torch.device("cpu"), torch.bfloat16, "svg")
    command = "`vidaccel break-even --heads 40 --head-dim 128 --device cpu --dtype bfloat16 --method svg --threads 1`"
    assert command in limit(other).why
    assert "--model a/b --device cpu --dtype bfloat16 --method svg --threads 1`" in limit(other, "a/b").why
    store(key, BreakEven(5888, 4864))
    assert limit(key).tokens == 5888 and limit(key).measured
    # What was not measured is not known to be dense's: the fixed default holds beyond.
    store(key, BreakEven(None, 2048))
    assert limit(key).tokens == 8192 and "Up to 2,048 tokens, dense was measured to be faster" in limit(key).why
    store(key, BreakEven(None, 32768))
    assert limit(key).tokens == 32769


# -- who uses it -------------------------------------------------------------------------------------------------------


def test_a_request_without_a_method_goes_by_what_was_measured(key):
    job = prepare("demo", SMALL, Sparse(), device="cpu")
    assert list(job.methods) == ["dense"] and job.notes == () and job.hint == limit(key, "demo").why
    store(key, BreakEven(40, 0))
    job = prepare("demo", SMALL, Sparse(density=0.5), device="cpu")
    assert list(job.methods) == ["tangent"] and "48 tokens, at least 40" in job.why
    assert job.hint == "" and job.notes[0] == "On this machine, sparse attention was measured to pay from 40 tokens."
    store(key, BreakEven(50, 40))
    with pytest.raises(BadInput, match="a video of fewer than 50 tokens is dense without one"):
        prepare("demo", SMALL, Sparse(density=0.5), device="cpu")


def test_a_method_that_is_given_is_not_questioned(key):
    store(key, BreakEven(50_000, 40_000))
    job = prepare("demo", SMALL, Sparse(("tangent",), 0.5), device="cpu")
    assert list(job.methods) == ["tangent"] and job.notes == ()


def test_a_loaded_pipeline_goes_by_it_too(key):
    store(key, BreakEven(40, 0))
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    options = {"frames": 9, "height": 64, "width": 64, "steps": 2, "density": 0.5, "progress": False}
    made = vidaccel.generate(pipe, PROMPT, **options)
    assert made.name == "tangent" and any("measured to pay from 40 tokens" in note for note in made.notes)
