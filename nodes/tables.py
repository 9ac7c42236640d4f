"""A report as a node shows it: a table in plain text and a heat map of layers and steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from ..attention import CallRecord, RunReport
from ..generation.figures import heat_map
from ..generation.report import format_seconds
from .news import News, why_dense


def report_text(news: News) -> str:
    """What a run did: method and settings, then for each step the density, what stayed dense and why, the backends and
    the seconds in attention; totals and notes at the end. Or why there is no such thing."""
    report = news.report
    lines = [news.heading] if news.heading else []
    if report.method:
        given = {name: value for name, value in report.config.items() if value not in ("", None)}
        settings = ", ".join(f"{name} {_shown(value)}" for name, value in given.items())
        lines.append(f"{report.method}: {settings}")
        if report.records or not news.heading:
            lines += filter(None, [why_dense(report)])
    for run in report.runs():
        records = [record for record in report.records if record.run == run]
        lines += ["", *_run_table(records)]
    lines += [f"Note: {note}" for note in report.notes]
    return "\n".join(lines)


def _shown(value: Any) -> Any:
    return ("off", "on")[value] if isinstance(value, bool) else value


def _run_table(records: list[CallRecord]) -> list[str]:
    models = ", ".join(sorted({record.model for record in records}))
    lines = [f"{models}, {len({record.layer for record in records})} layers"]
    lines.append(
        f"{'step':>7}  {'density':>7}  {'sparse calls':>12}  {'planning':>9}  {'attention':>9}  backend; dense because"
    )
    for step in sorted({record.step for record in records}):
        calls = [record for record in records if record.step == step]
        steps = calls[0].num_steps
        sparse = sum(not call.reason for call in calls)
        lines.append(
            f"{step + 1 if steps is None else f'{step + 1}/{steps}':>7}  {np.mean([c.density for c in calls]):>7.3f}  "
            f"{f'{sparse} of {len(calls)}':>12}  {format_seconds(sum(c.plan_seconds for c in calls)):>9}  "
            f"{format_seconds(sum(c.attention_seconds for c in calls)):>9}  {_why(calls)}"
        )
    planning, attention = sum(c.plan_seconds for c in records), sum(c.attention_seconds for c in records)
    lines.append(
        f"Mean density {np.mean([c.density for c in records]):.3f}; planning {format_seconds(planning)}, attention "
        f"{format_seconds(attention)}."
    )
    return lines


def _why(calls: list[CallRecord]) -> str:
    backends = Counter(call.backend for call in calls)
    reasons = Counter(call.reason for call in calls if call.reason)
    text = ", ".join(sorted(backends))
    return text + "".join(f"; {reason} ({count})" for reason, count in reasons.items())


def report_image(report: RunReport) -> torch.Tensor:
    """Density of every layer and step, `[1, H, W, 3]` in [0, 1], as ComfyUI's IMAGE. Several runs are put side by side.

    Without any call it is an empty chart.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    maps = [RunReport("", {}, tuple(r for r in report.records if r.run == run)).density_map() for run in report.runs()]
    rows = max((len(values) for values in maps), default=1)
    maps = [np.pad(values, ((0, rows - len(values)), (0, 0)), constant_values=np.nan) for values in maps]
    # With a list of two samplers each map begins at the step at which its sampler began.
    values = np.concatenate(maps, axis=1) if maps else np.full((1, 1), np.nan)
    figure = heat_map(values, "density")
    figure.set(dpi=144, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]
