"""A comparison for a reader: its numbers as JSON, and a page that holds videos, pictures and charts in one file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...pipelines.files.whole_files import write_bytes
from ..media.video import contact_sheet, data_url, png
from .comparison import Comparison, FrameMetrics, GeneratedVideo
from .figures import figure_svg, heat_map, line_chart, quantile_chart

if TYPE_CHECKING:
    import jinja2

    from ...attention.account.records import RunReport


VERSION = 1
"""Of the numbers beside a page."""


class HeatMap(NamedTuple):
    """Values `[layers, steps]` from 0 to `top`, NaN where there is none, and what they are."""

    label: str
    values: np.ndarray
    top: float = 1.0


# -- what the records say ----------------------------------------------------------------------------------------------


def temporal_share(report: RunReport) -> np.ndarray | None:
    """Share of temporal heads `[layers, steps]`, NaN where unknown (dense calls); None when no call has head kinds."""
    if all(r.details.get("temporal") is None for r in report.records):
        return None
    return report.map_of(lambda r: None if (kinds := r.details.get("temporal")) is None else float(np.mean(kinds)))


def cluster_deciles(report: RunReport) -> dict[str, np.ndarray] | None:
    """Cluster sizes in tokens at 0, 10, ..., 100 % of a call's clusters, `{"query": [calls, 11], "key": [calls, 11]}`.

    None when no call has clusters. A record may carry all sizes of its call or their deciles: deciles of deciles are
    the same deciles.
    """
    found = {}
    for label, key in (("query", "q_cluster_sizes"), ("key", "k_cluster_sizes")):
        calls = [np.ravel(r.details[key]) for r in report.records if r.details.get(key) is not None]
        if calls:
            found[label] = np.stack([np.quantile(sizes, np.linspace(0, 1, 11)) for sizes in calls])
    return found or None


def heat_maps(report: RunReport) -> list[HeatMap]:
    """What is known of each layer and step: the density; measured errors and predicted ones where there are some."""
    expected = "error as the method measured it" if report.measured_by_method() else "predicted error"
    errors = {"error": report.error_map(), expected: report.predicted_error_map()}
    known = {label: values for label, values in errors.items() if np.isfinite(values).any()}
    top = max((float(np.nanmax(values)) for values in known.values()), default=1.0) or 1.0  # one scale for both
    return [HeatMap("density", report.density_map()), *(HeatMap(label, values, top) for label, values in known.items())]


# -- output ------------------------------------------------------------------------------------------------------------


def contact_sheet_png(comparison: Comparison) -> bytes:
    """The contact sheet of a comparison as PNG."""
    return png(contact_sheet({v.name: v.frames for v in comparison.videos}))


def summary(comparison: Comparison, folder: str | Path) -> dict[str, Any]:
    """The numbers of a comparison, in types that JSON knows (identical frames have a PSNR of null).

    Args:
        comparison: with its files.
        folder: of the numbers; the videos' files are named as from there.
    """
    from ...attention.account.plain_values import plain

    videos = []
    for video, file in zip(comparison.videos, comparison.files, strict=True):
        entry: dict[str, Any] = {
            "name": video.name,
            "file": _seen_from(Path(folder), file),
            "seconds": video.seconds,
            "seconds_per_step_median": video.step_seconds,
            "denoise_seconds": video.denoise_seconds,
            "decode_seconds": video.decode_seconds,
            "warm_up_seconds": video.warm_up_seconds,
            "times_faster_than_dense": comparison.reference.seconds / video.seconds,
        }
        if video.name in comparison.metrics:
            entry["against_dense"] = _metrics_summary(comparison.metrics[video.name])
        if video.account is not None:
            entry["account"] = {"levers": video.account.levers, **video.account.counts()}
        if video.report is not None:
            entry["attention"] = _attention_summary(video.report)
        videos.append(entry)
    frames, height, width, _ = comparison.reference.frames.shape
    return plain(
        {
            "version": VERSION,
            "prompt": comparison.prompt,
            "command": comparison.command,
            "frames": frames,
            "height": height,
            "width": width,
            "fps": comparison.fps,
            "tokens": comparison.tokens,
            "settings": comparison.settings,
            "environment": comparison.environment,
            "notes": list(comparison.notes),
            "videos": videos,
        }
    )


def write_report(comparison: Comparison, page: Path) -> Comparison:
    """Write the page of a comparison, and beside it its numbers (.json) and its contact sheet (.png).

    Videos that have no files yet get some, beside the page as PAGE.METHOD.mp4.

    Args:
        comparison: to be shown.
        page: the .html file.

    Returns:
        The comparison with its files.
    """
    if not comparison.files:
        files = tuple(video.save(video_file(page, video.name)) for video in comparison.videos)
        comparison = replace(comparison, files=files)
    numbers, sheet = files_beside(page)
    write_json(comparison, numbers)
    picture = contact_sheet_png(comparison)  # made once
    write_bytes(picture, sheet)
    _write_page(comparison, page, picture)
    return comparison


def files_beside(page: Path) -> tuple[Path, Path]:
    """The files of a page's numbers and of its contact sheet."""
    return page.with_suffix(".json"), page.with_suffix(".png")


def video_file(page: Path, name: str) -> Path:
    """The file of a video that has none but beside its page."""
    return page.with_name(f"{page.stem}.{name}.mp4")


def write_json(comparison: Comparison, path: str | Path) -> Path:
    """Write `summary` as a file."""
    return write_numbers(summary(comparison, Path(path).parent), path)


def write_numbers(numbers: dict[str, Any], path: str | Path) -> Path:
    """Write what a page tells as JSON, in which there is no NaN."""
    from ...attention.account.plain_values import plain

    text = json.dumps(plain(numbers), indent=2, allow_nan=False)
    return write_bytes(text.encode() + b"\n", path)


def write_text(page: str, path: str | Path) -> Path:
    """Write a page; "?" stands for what is no text in UTF-8, such as bytes of a file's name in its command line."""
    return write_bytes(page.encode(errors="replace"), path)


def write_html(comparison: Comparison, path: str | Path) -> Path:
    """Write the page: one file with videos, pictures, numbers and script in it; it asks no server for anything.

    Raises:
        OSError: a video file of the comparison is missing.
    """
    return _write_page(comparison, path, contact_sheet_png(comparison))


def _write_page(comparison: Comparison, path: str | Path, sheet: bytes) -> Path:
    page = template("report.html.j2").render(_page(comparison, sheet))
    return write_text(page, path)


def template(name: str) -> jinja2.Template:
    """A page of `templates/`, with the filters for times, PSNR and shares."""
    import jinja2

    from ...attention.account.records import percent

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(seconds=format_seconds, decibel=format_psnr, percent=percent)
    return environment.get_template(name)


def format_seconds(value: float | None) -> str:
    """A time for a reader."""
    if value is None:
        return "–"
    # Rounded first: there is no "1000 ms", and no "2 min 60 s".
    if round(value * 1000) < 1000:
        return f"{value * 1000:.0f} ms"
    if round(value, 1) < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s"


OVER_WHAT_DIFFERS = "PSNR is the mean over the frames that differ; in brackets, how many are identical."
"""To be said of a table in which `format_psnr` tells of some."""


def format_psnr(value: float | None, identical: int = 0) -> str:
    """A PSNR for a reader.

    Args:
        value: in dB; see `comparison.mean_psnr`.
        identical: frames without any difference, which it leaves out.
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "identical"
    return f"{value:.1f} dB ({identical} identical)" if identical else f"{value:.1f} dB"


def _seen_from(folder: Path, file: Path) -> str:
    """The path of a file from a folder, with "/"; whole where there is none, as between the disks of Windows."""
    try:
        return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return file.resolve().as_posix()


def _metrics_summary(metrics: FrameMetrics) -> dict[str, Any]:
    finite = [None if math.isinf(value) else value for value in metrics.psnr]
    mean = None if math.isinf(metrics.mean_psnr) else metrics.mean_psnr
    return {
        "psnr_mean": mean,
        "ssim_mean": metrics.mean_ssim,
        "identical_frames": metrics.identical_frames,
        "psnr": finite,
        "ssim": list(metrics.ssim),
    }


def _attention_summary(report: RunReport) -> dict[str, Any]:
    out: dict[str, Any] = {
        "method": report.method,
        "config": report.config,
        "mean_density": report.mean_density(),
        "density_by_step": report.density_by_step(),
        "density_layers_x_steps": report.density_map(),
        "plan_seconds": report.plan_seconds,
        "attention_seconds": report.attention_seconds,
        "calls": len(report.records),
        "backends": report.backends(),
        "dense_calls": report.dense_reasons(),
        "notes": list(report.notes),
    }
    share = temporal_share(report)
    if share is not None:
        out["temporal_head_share"] = float(np.nanmean(share))
    if calls := report.measured():
        out["error"] = {
            "median": report.median_error(),
            "worst": {name: getattr(calls[0], name) for name in ("model", "layer", "step", "branch")}
            | {"error": calls[0].error, "predicted": calls[0].predicted_error},
            "calls": len(calls),
            "seconds": report.error_seconds,
            "layers_x_steps": report.error_map(),
            "predicted_layers_x_steps": report.predicted_error_map(),
        }
    if calls := report.measured_by_method():
        out["error_measured_by_method"] = {
            "median": float(np.median([call.own_error for call in calls])),
            "worst": {name: getattr(calls[0], name) for name in ("model", "layer", "step", "branch")}
            | {"error": calls[0].own_error},
            "calls": len(calls),
            "layers_x_steps": report.map_of(lambda call: call.own_error),
        }
    for name, deciles in (cluster_deciles(report) or {}).items():
        out[f"{name}_cluster_size_deciles"] = np.median(deciles, axis=0).tolist()
    return out


def _page(comparison: Comparison, sheet: bytes) -> dict[str, Any]:
    """What the template shows."""
    metrics = comparison.metrics
    rows = []
    for index, (video, file) in enumerate(zip(comparison.videos, comparison.files, strict=True)):
        count, height, width, _ = video.frames.shape
        rows.append(
            {
                "video": video,
                "metrics": metrics.get(video.name),
                "source": data_url(file.read_bytes(), "video/mp4"),
                "frames": count,
                "size": f"{width}x{height}",
                "attention": _attention_page(video, index) if video.report is not None else None,
            }
        )
    psnr = line_chart({name: m.psnr for name, m in metrics.items()}, "PSNR (dB)", least_span=2)
    ssim = line_chart({name: m.ssim for name, m in metrics.items()}, "SSIM", least_span=0.02)
    charts = [(figure_svg(psnr, "psnr"), "PSNR per frame"), (figure_svg(ssim, "ssim"), "SSIM per frame")]
    return {
        "comparison": comparison,
        "rows": rows,
        "charts": charts,
        "sheet": data_url(sheet, "image/png"),
        "some_identical": any(m.leaves_out for m in metrics.values()),
        "measured": any(v.report is not None and v.report.measured() for v in comparison.videos),
        "warm": any(v.warm_up_seconds is not None for v in comparison.videos),
    }


def _attention_page(video: GeneratedVideo, index: int) -> dict[str, Any]:
    report = video.report
    models = sorted({r.model for r in report.records})
    layers = "layer" if len(models) < 2 else f"layer ({', then '.join(models)})"
    figures = []
    for label, values, top in heat_maps(report):
        figure = heat_map(values, label, layers, top)
        name = f"{label.replace(' ', '-')}{index}"
        figures.append((figure_svg(figure, name), f"{label.capitalize()} per layer and step"))
    share = temporal_share(report)
    if share is not None:
        figure = heat_map(share, "share of temporal heads", layers)
        figures.append(
            (figure_svg(figure, f"heads{index}"), "Temporal heads per layer and step; the others are spatial")
        )
    deciles = cluster_deciles(report)
    if deciles is not None:
        caption = "Cluster sizes: line, the median of all sparse calls; band, 80 % of them"
        figures.append((figure_svg(quantile_chart(deciles), f"clusters{index}"), caption))
    sparse = sum(not r.reason for r in report.records)
    return {
        "figures": figures,
        "clusters": {name: np.median(d, axis=0).tolist() for name, d in (deciles or {}).items()},
        "config": report.settings(),
        "calls": len(report.records),
        "sparse_calls": sparse,
        "sparse_density": float(np.mean([r.density for r in report.records if not r.reason])) if sparse else None,
        "error": report.error_in_words(),
        "error_seconds": report.error_seconds,
        "dense_reasons": _counts(report.dense_reasons()),
        "backends": _counts(report.backends()),
        "notes": report.notes,
    }


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())
