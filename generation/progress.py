"""What a terminal or a notebook shows of a running job: a bar a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

    from .run import StageCallback


@contextlib.contextmanager
def bars(loading: str) -> Iterator[StageCallback]:
    """Progress bars, on standard error; what this gives is the `on_stage` of `run.make_videos`.

    Args:
        loading: what is loaded before the first run, or "" for nothing.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    tasks: dict[str, TaskID] = {}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}", markup=False)
    with Progress(text, *columns, console=Console(stderr=True)) as progress:
        wait = progress.add_task(f"loading {loading}", total=None) if loading else None

        def on_stage(name: str, stage: str, done: int, total: int) -> None:
            nonlocal wait
            if wait is not None:
                progress.remove_task(wait)
                wait = None
            described = name if stage == "steps" else f"{name}: {stage}"
            if name not in tasks:
                tasks[name] = progress.add_task(described, total=total)
            elif stage == "steps" and not done:
                progress.reset(tasks[name], description=described, total=total)
            progress.update(tasks[name], completed=done, total=total, description=described)
            if done == total:
                progress.stop_task(tasks[name])

        yield on_stage
