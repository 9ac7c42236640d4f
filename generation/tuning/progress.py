"""How far `tune` is: measurements that are done and to come, and a bar of them for a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .bench import Done


@dataclass
class Counted:
    """Counts measurements: one is done where the next is told of.

    Args:
        show: told of how many are done, and of how many at the most; of these, None until that is known.
    """

    show: Callable[[int, int | None], None]
    done: int = 0
    total: int | None = None
    what: str = ""

    def tell(self, what: str, number: int, count: int) -> None:
        """See `bench.Done`."""
        if self.what and self.what != what:
            self.done += 1
        self.what = what
        self.show(self.done, self.total)

    def expect(self, count: int) -> None:
        """So many more may come."""
        self.total = self.done + count
        self.show(self.done, self.total)


@contextlib.contextmanager
def counted() -> Iterator[tuple[Done, Callable[[int], None]]]:
    """A bar on standard error; gives what is told of each measurement, and of how many more there may be."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("at most"), TimeRemainingColumn())
    with Progress(text, *columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("loading", total=None)
        state = Counted(lambda done, total: progress.update(task, completed=done, total=total))

        def tell(what: str, number: int, count: int) -> None:
            state.tell(what, number, count)
            progress.update(task, description=what if count < 2 else f"{what}: video {number + 1} of {count}")

        yield tell, state.expect
