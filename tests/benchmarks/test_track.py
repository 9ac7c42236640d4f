"""`benchmarks/track.py`: lines are appended, and what is worse than its noise is told, with timings that are given."""

from __future__ import annotations

import json

import pytest
from benchmark_scripts import imported, run

HERE = {"system": "Linux x86_64", "CPU": "one, 2 cores", "device": "cpu", "torch": "2.13"}
STEADY = [1.00, 1.01, 0.99, 1.00, 1.01]


@pytest.fixture(scope="module")
def track():
    with imported("track") as module:
        yield module


def times(values, factor):
    return [factor * value for value in values]


def test_a_run_is_appended_and_the_first_is_compared_with_nothing(track, tmp_path):
    file = tmp_path / "track.jsonl"
    first = track.track({"step": STEADY}, HERE, "abc", file)
    assert first["step"].baseline is None and not first["step"].is_worse
    before = file.read_text()
    track.track({"step": STEADY}, HERE, "def+", file)
    assert file.read_text().startswith(before) and len(track.read(file)) == 2
    line = track.read(file)[1]
    assert line["commit"] == "def+" and line["environment"] == HERE and line["figures"]["step"] == STEADY


def test_what_is_slower_than_the_noise_is_told_with_its_bound(track, tmp_path):
    file = tmp_path / "track.jsonl"
    for _ in range(3):
        track.track({"step": STEADY}, HERE, "a", file)
    within = track.track({"step": times(STEADY, 1.03)}, HERE, "b", file)["step"]
    assert not within.is_worse and 1.04 < within.bound < 1.1 and within.runs == 3
    worse = track.track({"step": times(STEADY, 1.2)}, HERE, "c", file)["step"]
    assert worse.is_worse and track.read(file)[-1]["worse"] == ["step"]


def test_a_noisy_machine_has_a_wider_bound(track):
    noisy = [1.0, 1.3, 0.8, 1.1, 0.9]
    assert track.judge(times(STEADY, 1.2), [STEADY]).is_worse
    assert not track.judge(times(noisy, 1.2), [STEADY]).is_worse
    assert not track.judge(times(STEADY, 1.2), [noisy]).is_worse
    # Each run is steady, but one does not repeat the other.
    assert not track.judge(times(STEADY, 1.2), [STEADY, times(STEADY, 1.15)]).is_worse


def test_repeats_without_any_spread_still_have_a_bound(track):
    assert not track.judge([1.015] * 3, [[1.0] * 3]).is_worse and track.judge([1.03] * 3, [[1.0] * 3]).is_worse


def test_slow_runs_do_not_become_the_measure_until_they_are_accepted(track, tmp_path):
    file, slow = tmp_path / "track.jsonl", times(STEADY, 1.3)
    track.track({"step": STEADY}, HERE, "a", file)
    assert all(track.track({"step": slow}, HERE, "b", file)["step"].is_worse for _ in range(3))
    track.track({"step": slow}, HERE, "b", file, accept=True)
    after = track.track({"step": slow}, HERE, "b", file)["step"]
    assert not after.is_worse and after.baseline == pytest.approx(1.3) and after.runs == 1


def test_another_machine_is_not_compared(track, tmp_path):
    file = tmp_path / "track.jsonl"
    track.track({"step": STEADY}, HERE, "a", file)
    other = track.track({"step": times(STEADY, 3)}, HERE | {"CPU": "another"}, "a", file)["step"]
    assert other.baseline is None
    newer = track.track({"step": STEADY}, HERE | {"torch": "2.14"}, "a", file)["step"]
    assert newer.runs == 1  # versions are what may have made it slower


def test_a_broken_line_is_named_before_anything_is_written(track, tmp_path):
    file = tmp_path / "track.jsonl"
    track.track({"step": STEADY}, HERE, "a", file)
    file.write_text(file.read_text() + '{"time": "2026')
    before = file.read_bytes()
    with pytest.raises(track.TrackError, match=r"track.jsonl:2 is no JSON .* delete that line"):
        track.track({"step": STEADY}, HERE, "a", file)
    assert file.read_bytes() == before


@pytest.mark.slow
def test_it_runs(tmp_path):
    """Small: every figure is measured, one line a run."""
    out = tmp_path / "track.jsonl"
    run("track.py", "--frames", "33", "--methods", "sparge,tangent", "--repeats", "3", "--out", str(out))
    [line] = [json.loads(text) for text in out.read_text().splitlines()]
    names = " ".join(line["figures"])
    assert all(f"{name}, of dense" in names for name in ("sparge", "tangent")) and "demo-dc" in names
    assert all(len(values) == 3 and min(values) > 0 for values in line["figures"].values())
    assert line["worse"] == [] and line["environment"]["torch"] and line["commit"]
