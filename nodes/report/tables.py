"""A report as a node shows it: tables in plain text and heat maps of layers and steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...attention import CallRecord, RunReport
from ...attention.account.records import percent
from ...generation.report.figures import heat_map
from ...generation.report.page import HeatMap, format_seconds, heat_maps
from .news import News, why_dense


def report_text(news: News) -> str:
    """What a run did: method and settings, then for each step the density, what stayed dense and why, the backends and
    the seconds in attention; measured errors; totals and notes at the end. Or why there is no such thing."""
    report = news.report
    lines = [news.heading] if news.heading else []
    if report.method:
        settings = ", ".join(f"{name} {_shown(value)}" for name, value in report.settings().items())
        lines.append(f"{report.method}: {settings}")
        if report.records or not news.heading:
            lines += filter(None, [why_dense(report)])
    for run in report.runs():
        records = [record for record in report.records if record.run == run]
        lines += ["", *_run_table(records)]
    lines += [f"Note: {note}" for note in report.notes]
    return "\n".join(lines)


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:g}"
    return ("off", "on")[value] if isinstance(value, bool) else value


def _run_table(records: list[CallRecord]) -> list[str]:
    models = ", ".join(sorted({record.model for record in records}))
    lines = [f"{models}, {len({record.layer for record in records})} layers"]
    lines.append(
        f"{'step':>7}  {'density':>7}  {'sparse calls':>12}  {'planning':>9}  {'attention':>9}  backend; dense because"
    )
    for step in sorted({record.step for record in records}):
        calls = [record for record in records if record.step == step]
        sparse = sum(not call.reason for call in calls)
        lines.append(
            f"{_step_words(calls[0]):>7}  {np.mean([c.density for c in calls]):>7.3f}  "
            f"{f'{sparse} of {len(calls)}':>12}  {format_seconds(sum(c.plan_seconds for c in calls)):>9}  "
            f"{format_seconds(sum(c.attention_seconds for c in calls)):>9}  {_why(calls)}"
        )
    planning, attention = sum(c.plan_seconds for c in records), sum(c.attention_seconds for c in records)
    lines.append(
        f"Mean density {np.mean([c.density for c in records]):.3f}; planning {format_seconds(planning)}, attention "
        f"{format_seconds(attention)}."
    )
    return lines + _errors(RunReport("", {}, tuple(records)))


def _errors(run: RunReport) -> list[str]:
    """The measured errors of a run: in words, and a table of the steps where there are some."""
    calls = run.measured()
    if not calls:
        words = run.error_in_words(first_step=1)  # of a method that measures itself
        return [f"{words[0].upper()}{words[1:]}."] if words else []
    of_models = len({call.model for call in calls}) > 1
    predicts = any(call.predicted_error is not None for call in calls)
    lines = ["", f"{'step':>7}  {'median error':>12}  {'worst error':>11}{'  predicted' * predicts}  worst in"]
    for step in sorted({call.step for call in calls}):
        of_step = [call for call in calls if call.step == step]  # the worst first
        worst, expected = of_step[0], [c.predicted_error for c in of_step if c.predicted_error is not None]
        predicted = f"  {percent(float(np.median(expected))) if expected else '':>9}" * predicts
        lines.append(
            f"{_step_words(worst):>7}  {percent(float(np.median([c.error for c in of_step]))):>12}  "
            f"{percent(worst.error):>11}{predicted}  {_layer_words(worst, of_models)}, {worst.branch}"
        )
    worst = calls[0]
    lines.append(
        f"Measured error of the output in {len(calls)} sparse calls: median {percent(run.median_error())}, worst "
        f"{percent(worst.error)} in {_layer_words(worst, of_models)} at step {_step_words(worst)}; measuring "
        f"{format_seconds(run.error_seconds)}."
    )
    return lines


def _layer_words(call: CallRecord, of_models: bool) -> str:
    return f"layer {call.layer} of {call.model}" if of_models else f"layer {call.layer}"


def _step_words(call: CallRecord) -> str:
    return f"{call.step + 1}" if call.num_steps is None else f"{call.step + 1}/{call.num_steps}"


def _why(calls: list[CallRecord]) -> str:
    backends = Counter(call.backend for call in calls)
    reasons = Counter(call.reason for call in calls if call.reason)
    text = ", ".join(sorted(backends))
    return text + "".join(f"; {reason} ({count})" for reason, count in reasons.items())


def report_image(report: RunReport) -> torch.Tensor:
    """Density of every layer and step, `[1, H, W, 3]` in [0, 1], as ComfyUI's IMAGE. Several runs are put side by side.

    Below it are measured errors and what the method predicted, where there are some. Without any call it is an empty
    chart.
    """
    pictures = [_picture(shown) for shown in heat_maps(side_by_side(report))]
    return torch.cat(pictures)[None]


def side_by_side(report: RunReport) -> RunReport:
    """The runs as one, each behind the steps of the one before: two samplers with a step 0 each are no branches.

    With a list of two samplers each run begins at the step at which its sampler began.
    """
    records, steps = [], 0
    for run in report.runs():
        calls = [record for record in report.records if record.run == run]
        records += [replace(call, run=0, step=call.step + steps) for call in calls]
        steps += max(call.step for call in calls) + 1
    return replace(report, records=tuple(records))


def _picture(shown: HeatMap) -> torch.Tensor:
    """A heat map as pixels, `[H, W, 3]` in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    values = shown.values if shown.values.size else np.full((1, 1), np.nan)
    figure = heat_map(values, shown.label, top=shown.top, first_step=1)
    figure.set(dpi=144, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255)
