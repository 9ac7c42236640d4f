"""How far a run is: bars on a terminal, a line now and then in a file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars


class Progress:
    """Shows tasks, one inside the other.

    Args:
        console: of rich; None for one on standard output.
        seconds: between the lines of a task where there is no terminal.
    """

    def __init__(self, console: Console | None = None, seconds: float = 30.0) -> None:
        from rich.console import Console

        self.console = console or Console()
        self.seconds = seconds
        self._bars: Bars | None = None

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bars is not None:
            self.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    @contextlib.contextmanager
    def task(self, what: str, total: int, done: int = 0, lines: bool = True) -> Iterator[Callable[[], None]]:
        """Yields what to call after each item.

        Args:
            what: is done, such as "encoding clips".
            total, done: items, and those that are done already.
            lines: False where something else writes lines about it.
        """
        if not self.console.is_terminal:
            yield _Lines(what, total, self.seconds) if lines else lambda: None
            return
        with self._shown() as bars:
            number = bars.add_task(what, total=total, completed=done)
            try:
                yield lambda: bars.advance(number)
            finally:
                bars.remove_task(number)

    def close(self) -> None:
        """Remove the bar, wherever the run was left."""
        if self._bars is not None:
            self._bars.stop()

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Bars]:
        if self._bars is not None:
            yield self._bars
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left")]
        with Bars(*columns, console=self.console, transient=True) as self._bars:
            try:
                yield self._bars
            finally:
                self._bars = None


class _Lines:
    """A line about a task, at most every so many seconds."""

    def __init__(self, what: str, total: int, seconds: float) -> None:
        self.what, self.total, self.seconds = what, total, seconds
        self.done, self.begin = 0, time.perf_counter()
        self.last = self.begin

    def __call__(self) -> None:
        self.done += 1
        now = time.perf_counter()
        if now - self.last < self.seconds:
            return
        self.last = now
        rate = self.done / max(now - self.begin, 1e-9)
        left = duration((self.total - self.done) / rate)
        print(f"{self.what}: {self.done} of {self.total}, {each(1 / rate)}, {left} left", flush=True)


def duration(seconds: float) -> str:
    """Such as "45 s", "12 min" or "3 h 20 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def each(seconds: float) -> str:
    """The rate of items that take so long: "2.5 s each", or "8 a second"."""
    return f"{seconds:.3g} s each" if seconds >= 1 else f"{1 / seconds:.3g} a second"
