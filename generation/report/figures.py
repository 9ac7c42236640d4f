"""The charts of a comparison page, as SVG that takes the page's text colour and font."""

from __future__ import annotations

import io
import itertools
import re
from typing import TYPE_CHECKING

import numpy as np

from .wrapping import wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

COLOURS = ("#3d7fd0", "#d97b29", "#2f9e6e", "#9a63c4", "#c4476b", "#8a8a2f")
"""Lines of the charts: readable on white and on near-black."""
INK = "#0a0b0c"
"""Stands for the page's own text colour in a figure; `figure_svg` replaces it."""
_PADDING = 0.15
"""Inches between the axes' left edge and a legend, and beyond it, at the least."""


def line_chart(series: dict[str, tuple[float, ...]], ylabel: str, least_span: float) -> Figure:
    """One line per method over the frames. Infinite values (identical frames) are left out.

    Args:
        series: method -> value per frame.
        ylabel: what the values are.
        least_span: the vertical axis covers at least this much, so that rounding does not look like a trend.
    """
    figure, axes = _figure(2.9)
    for (name, values), colour in zip(series.items(), itertools.cycle(COLOURS)):
        finite = np.where(np.isfinite(values), values, np.nan)
        axes.plot(finite, label=name, color=colour, linewidth=1.8, marker=".")
    low, high = axes.get_ylim()
    if high - low < least_span:
        axes.set_ylim(high - least_span, high)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("frame")
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.locator_params(axis="x", integer=True)
    _legend(axes)
    return figure


def heat_map(values: np.ndarray, label: str, rows: str = "layer", top: float = 1.0, first_step: int = 0) -> Figure:
    """`values [layers, steps]` from 0 to `top`; NaN stays empty.

    Args:
        values: what to show. label: what they are. rows: what the rows are. top: the end of the scale.
        first_step: from which the reader counts steps.
    """
    figure, axes = _figure(1.5 + 0.11 * min(30, max(len(values), 8)))
    layers, steps = values.shape
    # The edges of the first and last cells; rows go down.
    extent = (first_step - 0.5, first_step + steps - 0.5, layers - 0.5, -0.5)
    image = axes.imshow(values, vmin=0, vmax=top, aspect="auto", cmap="viridis", interpolation="nearest", extent=extent)
    axes.set_xlabel("step")
    axes.set_ylabel(rows)
    axes.locator_params(integer=True)
    bar = figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.03)
    _tint(bar.ax)
    bar.outline.set_visible(False)
    return figure


def quantile_chart(deciles: dict[str, np.ndarray]) -> Figure:
    """Sizes of clusters from the smallest to the largest: the median of all calls, and the band of the middle 80 %.

    Args:
        deciles: name -> `[calls, 11]`, the sizes in tokens at 0, 10, ..., 100 % of a call's clusters.
    """
    figure, axes = _figure(2.9)
    percent = np.linspace(0, 100, 11)
    for (name, values), colour in zip(deciles.items(), itertools.cycle(COLOURS)):
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=0)
        axes.fill_between(percent, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(percent, middle, color=colour, linewidth=1.8, label=f"{name} clusters")
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("clusters, smallest to largest (%)")
    axes.set_ylabel("tokens in the cluster")
    _legend(axes)
    return figure


def waterfall_chart(rows: dict[str, tuple[float, float, float]], told: list[str]) -> Figure:
    """One bar a row, from the top: seconds, and how far its rounds spread.

    Args:
        rows: name -> seconds, the least and the most of the rounds.
        told: what stands behind each bar.
    """
    figure, axes = _figure(0.75 + 0.36 * len(rows))
    names = list(rows)
    values = np.array([rows[name] for name in names])
    places = np.arange(len(names))
    colours = [COLOURS[5] if not place else COLOURS[0] for place in places]
    axes.barh(places, values[:, 0], height=0.62, color=colours)
    around = np.abs(values[:, 1:].T - values[:, 0])
    axes.errorbar(values[:, 0], places, xerr=around, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    for place, text in enumerate(told):
        axes.text(values[place, 2] + 0.03 * values.max(), place, text, color=INK, size=9, va="center")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * values.max())  # room for what stands behind the longest
    axes.set_xlabel("seconds a video")
    axes.grid(axis="x", color=INK, alpha=0.12)
    return figure


def pareto_chart(points: list[tuple[float, float, bool]], dense: float, bound: float | None = None) -> Figure:
    """Seconds over PSNR, a point each, and a line through those than which none is both faster and nearer.

    Args:
        points: PSNR in dB, seconds, and whether it is the chosen one.
        dense: seconds of a dense video.
        bound: the least PSNR that is wanted.
    """
    figure, axes = _figure(3.2)
    best, least = [], np.inf
    for psnr, seconds, _ in sorted(points, key=lambda p: (-p[0], p[1])):
        if seconds < least:
            best.append((psnr, seconds))
            least = seconds
    axes.plot(*zip(*best, strict=True), color=COLOURS[0], linewidth=1.2, alpha=0.7)
    for psnr, seconds, chosen in points:
        axes.plot(psnr, seconds, marker="*" if chosen else "o", markersize=13 if chosen else 5, color=COLOURS[chosen])
    axes.axhline(dense, color=INK, alpha=0.5, linewidth=1, linestyle="--")
    if bound is not None:
        axes.axvline(bound, color=INK, alpha=0.6, linewidth=1.2, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("PSNR to dense (dB)")
    axes.set_ylabel("seconds a video")
    axes.grid(color=INK, alpha=0.12)
    return figure


def figure_svg(figure: Figure, name: str) -> str:
    """A figure as SVG to be put into a page: text stays text, `INK` becomes the page's text colour.

    Args:
        figure: what to draw.
        name: starts every id of the figure, so that two figures of one page do not share any.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # In a page the parser knows both namespaces, and the size is the page's business.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)


def _figure(height: float) -> tuple[Figure, Axes]:
    """An empty chart of a phone's width (charts are scaled up on a desk, never down to unreadable)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.9, height), layout="constrained")
    axes = figure.add_subplot()
    _tint(axes)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _tint(axes: Axes) -> None:
    """Everything but the data in the page's text colour."""
    axes.tick_params(color=INK, labelcolor=INK, labelsize=9, which="both")
    axes.xaxis.label.set(color=INK, size=9.5)
    axes.yaxis.label.set(color=INK, size=9.5)
    for spine in axes.spines.values():
        spine.set(color=INK, alpha=0.4)


def _legend(axes: Axes) -> None:
    """Above the data, never on it, and within the figure: fewer names a line where they are long, and a higher figure.

    A legend that is wider than the figure leaves no room for the axes, and is cut off.
    """
    figure = axes.get_figure(root=True)
    figure.draw_without_rendering()  # the layout, for where the axes begin
    room = figure.bbox.width - axes.bbox.x0 - _PADDING * figure.dpi
    handles, names = axes.get_legend_handles_labels()

    def put(columns: int, labels: list[str]) -> Legend:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0)}
        return axes.legend(handles, labels, frameon=False, labelcolor=INK, ncols=columns, **place)

    line = put(len(names), names).get_window_extent().height
    columns = min(4, len(names))
    legend = put(columns, names)
    while columns > 1 and legend.get_window_extent().width > room:
        columns -= 1
        legend = put(columns, names)
    if (over := legend.get_window_extent().width - room) > 0:
        text = legend.get_texts()[0]

        def width(label: str) -> float:
            text.set_text(label)
            return text.get_window_extent().width

        most = max(map(width, names)) - over
        legend = put(1, [wrapped(name, width, most) for name in names])
    wide, high = figure.get_size_inches()
    figure.set_size_inches(wide, high + (legend.get_window_extent().height - line) / figure.dpi)
