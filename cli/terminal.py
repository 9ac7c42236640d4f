"""What `vidaccel generate` does on a terminal: runs with their progress, files as they come, the table at the end."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from ..attention.methods.base import Method
    from ..generation.report import Comparison, GeneratedVideo
    from ..generation.request import ModelFacts, Settings


def make_videos(
    facts: ModelFacts,
    settings: Settings,
    methods: dict[str, Method | None],
    files: dict[str, Path],
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    warm: bool,
    loading: dict[str, bool],
) -> list[GeneratedVideo]:
    """Make every video and write each as soon as it is there, so that Ctrl-C in a later run loses nothing.

    Args:
        facts, settings: of the model and the request.
        methods, files: method (None for dense) and file by name, in the order of the runs.
        device, dtype, backend: where and how.
        warm: whether an uncounted step comes before each run.
        loading: options of `generation.load`.
    """
    from ..generation.run import generate, load, warm_up
    from ..generation.video import write_mp4

    videos = []
    with _progress() as progress:
        wait = progress.add_task(f"loading {facts.name}", total=None)
        pipe = load(facts, dtype, device, **loading)
        progress.remove_task(wait)
        for name, method in methods.items():
            task = progress.add_task(f"{name}: warm-up" if warm else name, total=settings.steps)
            warm_seconds = warm_up(pipe, settings, method, backend=backend) if warm else None
            progress.reset(task, description=name)

            def advance(done: int, total: int, task: Any = task, name: str = name) -> None:
                progress.update(task, completed=done, description=name if done < total else f"{name}: decoding")

            video = generate(pipe, settings, name, method, backend=backend, on_step=advance)
            progress.update(task, description=name)
            progress.stop_task(task)
            write_mp4(video.frames, files[name], settings.fps)
            videos.append(replace(video, warm_up_seconds=warm_seconds))
    return videos


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def write_comparison(
    videos: list[GeneratedVideo],
    files: dict[str, Path],
    settings: Settings,
    tokens: int,
    described: dict[str, str],
    machine: dict[str, str],
    page: Path,
) -> None:
    """Write the page of a comparison, its numbers and its contact sheet, and print the table.

    Args:
        videos, files: the dense one first; files by name.
        settings: the request.
        tokens: length of the sequence in self-attention.
        described, machine: settings and environment, name -> value.
        page: the .html; .json and .png go beside it.
    """
    from ..generation.report import Comparison, contact_sheet_png, write_html, write_json
    from ..generation.video import write_bytes

    comparison = Comparison(
        prompt=settings.prompt,
        videos=tuple(videos),
        files=tuple(files[v.name] for v in videos),
        fps=settings.fps,
        tokens=tokens,
        settings=described,
        environment=machine,
        command=shlex.join(["vidaccel", *sys.argv[1:]]),
    )
    write_json(comparison, page.with_suffix(".json"))
    write_bytes(contact_sheet_png(comparison), page.with_suffix(".png"))
    write_html(comparison, page)
    print_summary(videos, files, comparison)
    typer.echo(f"comparison: {page} (open it in a browser); numbers: {page.with_suffix('.json')}")


def print_summary(videos: list[GeneratedVideo], files: dict[str, Path], comparison: Comparison | None = None) -> None:
    """Print a table of the runs, and which of them stayed dense against what was asked for."""
    from rich.console import Console
    from rich.table import Table

    from ..generation.report import format_psnr, format_seconds

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("method")
    for title in ("time", "density", *(("PSNR", "SSIM") if comparison else ())):
        table.add_column(title, justify="right")
    table.add_column("file", overflow="fold")
    for video in videos:
        density = "100 %" if video.report is None else f"{100 * video.report.mean_density():.0f} %"
        row = [video.name, format_seconds(video.seconds), density]
        if comparison:
            metrics = comparison.metrics.get(video.name)
            row += [format_psnr(metrics.mean_psnr), f"{metrics.mean_ssim:.3f}"] if metrics else ["–", "–"]
        table.add_row(*row, str(files[video.name]))
    Console().print(table)
    for video in videos:
        if note := all_dense(video):
            typer.echo(note)


def all_dense(video: GeneratedVideo) -> str:
    """Why no call of an accelerated run was sparse, in one line; empty when some were."""
    records = video.report.records if video.report is not None else ()
    if not records or any(not record.reason for record in records):
        return ""
    reasons = sorted({record.reason for record in records})
    text = f"{video.name}: every step stayed dense"
    if "unknown layout" in reasons:
        return f"{text} ({', '.join(reasons)})."
    steps = 1 + max(record.step for record in records)
    return (
        f"{text} because of the schedule ({', '.join(reasons)}; this run has {steps} step{'s' if steps > 1 else ''}): "
        "give more --steps, or lower --dense-steps and --dense-layers."
    )
