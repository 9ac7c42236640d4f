"""What `tune` found for a reader: a page in one file, and its numbers as JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..report.figures import figure_svg, pareto_chart
from ..report.page import template, write_numbers, write_text
from .result import Tuned

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_page(made: Tuned, page: Path) -> Path:
    """Write the page, and the numbers beside it (.json); files that are there are replaced.

    Args:
        made: to be shown.
        page: the .html file.
    """
    import yaml

    write_numbers(made.to_dict(), page.with_suffix(".json"))
    chart = _front(made)
    rest = [each for each in made.tried if each.confirmed is None]
    html = template("tune.html.j2").render(
        t=made,
        chart=None if chart is None else figure_svg(chart, "front"),
        rest=rest,
        yaml=made.preset and yaml.safe_dump(made.preset.to_dict(), sort_keys=False, allow_unicode=True),
    )
    return write_text(html, page)


def _front(made: Tuned) -> Figure | None:
    """Seconds over PSNR of those with whole videos; None where there are none."""
    points = [
        (each.confirmed.mean_psnr, each.confirmed.median, each is made.chosen)
        for each in made.confirmed
        if math.isfinite(each.confirmed.mean_psnr)
    ]
    return pareto_chart(points, made.dense_seconds, made.budget.min_psnr) if points else None
