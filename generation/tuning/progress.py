"""What a terminal shows of `tune`: one bar over all measurements, and what is measured now."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .bench import Done


@contextlib.contextmanager
def counted() -> Iterator[tuple[Done, Callable[[int], None]]]:
    """A bar on standard error; gives what is told of each measurement, and of how many more there may be."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("at most"), TimeRemainingColumn())
    with Progress(text, *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading", total=None)
        last = [""]

        def tell(what: str, number: int, count: int) -> None:
            if last[0] and last[0] != what:
                progress.advance(task)
            last[0] = what
            progress.update(task, description=what if count < 2 else f"{what}: video {number + 1} of {count}")

        def expect(count: int) -> None:
            progress.update(task, total=progress.tasks[0].completed + count)

        yield tell, expect
