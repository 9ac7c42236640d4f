"""A showcase for a reader: a page in one file, and its numbers as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...pipelines.files.whole_files import write_bytes
from ..media.video import contact_sheet, data_url, mp4_url, png
from ..report.comparison import compare
from ..report.page import template, write_numbers, write_text
from .measured import Showcase

NAMES = {
    "base": ("plain model", "20 steps, guidance in two passes"),
    "model": ("deep compression", "the same model in a latent space with a quarter of the tokens"),
    "guidance_free": ("guidance in one pass", "an adapter for half the passes"),
    "steps": ("few steps", ""),
    "decoder": ("tiny decoder", "frames from 1.2 million parameters; shapes are softer"),
}
"""Lever -> what the page calls it and says of it."""


def write_showcase(made: Showcase, page: Path, command: str) -> Path:
    """Write the page of a showcase, and beside it its numbers (.json) and its contact sheet (.png).

    Args:
        made: to be shown.
        page: the .html file.
        command: that makes it again.
    """
    write_numbers(made.to_dict(), page.with_suffix(".json"))
    rows = _rows(made)
    frames = min(len(row.sample) for row in made.waterfall.rows)
    named = {told["name"]: row.sample[:frames] for told, row in zip(rows, made.waterfall.rows, strict=True)}
    sheet = png(contact_sheet(named))
    write_bytes(sheet, page.with_suffix(".png"))
    html = template("showcase.html.j2").render(
        gain=made.in_words(),
        prompt=made.waterfall.prompts[0],
        rows=rows,
        prompts=max((a.prompts for a in made.accuracy if a is not None), default=0),
        sheet=data_url(sheet, "image/png"),
        tokens=made.tokens,
        steps=_steps(made),
        waterfall=made.waterfall,
        command=command,
    )
    return write_text(html, page)


def _rows(made: Showcase) -> list[dict[str, Any]]:
    """What the page tells of each lever."""
    fall, found = made.waterfall, []
    slowest = max(row.median for row in fall.rows)
    same = next((row for row in fall.rows if row.stage.name == "model"), None)
    for number, (row, accuracy) in enumerate(zip(fall.rows, made.accuracy, strict=True)):
        name, does = NAMES.get(row.stage.name, (row.stage.name, row.stage.text))
        near = compare(same.sample, row.sample) if same is not None and row is not same and number else None
        found.append(
            {
                "name": name if not number else f"+ {name}",
                "does": does or row.stage.text,
                "seconds": row.median,
                "width": 100 * row.median / slowest,
                "gain": fall.gain(row),
                "range": fall.gain_range(row),
                "passes": f"{sum(row.forwards):g}",
                "near": near,
                "accuracy": accuracy,
                "right": None if row.right is None else row.right[0],
                "video": mp4_url(row.sample),
            }
        )
    return found


def _steps(made: Showcase) -> list[dict[str, Any]]:
    """What the page tells of each method at the long video."""
    if not made.steps:
        return []
    dense = made.steps["dense"]
    slowest = max(times.seconds for times in made.steps.values())
    return [
        {
            "name": name,
            "times": times,
            "width": 100 * times.seconds / slowest,
            "gain": dense.seconds / times.seconds,
            "attention": dense.attention_seconds / times.attention_seconds,
        }
        for name, times in made.steps.items()
    ]
