"""Reports and videos made by hand, so that every number on the page is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vidaccel.attention.account.records import CallRecord, RunReport
from vidaccel.generation.media.video import write_mp4
from vidaccel.generation.report.comparison import Comparison, GeneratedVideo


@pytest.fixture
def clip() -> np.ndarray:
    """`[6, 32, 48, 3]` uint8: a bright square that moves over a gradient."""
    y, x = np.mgrid[:32, :48]
    frames = np.stack([np.stack([4 * x, 6 * y, np.full_like(x, 60)], -1) for _ in range(6)]).astype(np.uint8)
    for index in range(6):
        frames[index, 10:20, 4 + 5 * index : 14 + 5 * index] = 230
    return frames


@pytest.fixture
def loads_nothing(monkeypatch):
    """A request of `vidaccel.generate` that gets as far as reading weights fails the test."""
    monkeypatch.setattr("vidaccel.generation.api.load", lambda *_, **__: pytest.fail("weights were read"))


def _records(method: str, details: dict, density: float = 0.25) -> tuple[CallRecord, ...]:
    """3 steps of 2 layers with two branches; the first step is dense."""
    return tuple(
        CallRecord(
            run=0, step=step, num_steps=3, branch=branch, model="transformer", layer=layer, method=method,
            density=density if step else 1.0, reason="" if step else "first steps", backend="flex" if step else "dense",
            plan_seconds=0.5 if step else 0.0, attention_seconds=0.25, details=details if step else {},
        )
        for step in range(3) for layer in range(2) for branch in ("cond", "uncond")
    )  # fmt: skip


@pytest.fixture
def reports() -> dict[str, RunReport]:
    """A report each of a method with head kinds and of one with clusters."""
    sizes = {"q_cluster_sizes": list(range(0, 101, 10)), "k_cluster_sizes": [5.0] * 11}
    return {
        "svg": RunReport("svg", {"density": 0.25}, _records("svg", {"temporal": [1.0, 0.0, 0.0, 0.0]})),
        "svg2": RunReport(
            "svg2", {"top_p": 0.9}, _records("svg2", sizes), ("flex cannot do <this>: gather took over",)
        ),
    }


@pytest.fixture
def comparison(clip, reports, tmp_path: Path) -> Callable[..., Comparison]:
    """`comparison(svg=frames, ...)`: dense, and a video for each name."""

    def make(prompt: str = "a square", **frames: np.ndarray) -> Comparison:
        videos = [GeneratedVideo("dense", clip, 8.0, None, 0.75, 0.5, 2.0, fps=8.0)]
        videos += [GeneratedVideo(name, f, 4.0, reports[name], 0.25, 0.5, 3.0, fps=8.0) for name, f in frames.items()]
        files = tuple(write_mp4(v.frames, tmp_path / f"{v.name}.mp4", 8) for v in videos)
        facts = {"settings": {"seed": "5"}, "environment": {"torch": "x.y"}}
        return Comparison(prompt, tuple(videos), 36, **facts, command="vidaccel generate", files=files)

    return make


@pytest.fixture
def measured(reports) -> RunReport:
    """The report of svg2 with measured errors of 1 % a layer and step, 9 % at one place, and half of it predicted."""
    records = []
    for record in reports["svg2"].records:
        error = None if record.reason else 0.09 if (record.layer, record.step) == (1, 2) else 0.01
        details = record.details if error is None else {**record.details, "predicted_error": [error / 2]}
        records.append(replace(record, error=error, error_seconds=0.0 if error is None else 0.125, details=details))
    return replace(reports["svg2"], records=tuple(records))
