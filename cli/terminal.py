"""What commands say of themselves and, done, of their runs: the table, and what a user should know of them."""

from __future__ import annotations

import codecs
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..generation.report.comparison import Comparison, FrameMetrics, GeneratedVideo


def show_what_can_be_shown() -> None:
    """What the encoding of standard output lacks is printed as "?", where it would end a run that is done.

    Standard error has escapes for it already. Where Python passes bytes of another encoding through, as in the locale
    C, names of files go out as they came in.
    """
    out = sys.stdout
    if not hasattr(out, "reconfigure"):  # none at all, or that of a test
        return
    passes = out.errors == "surrogateescape" and codecs.lookup(out.encoding).name == "utf-8"
    if out.errors in ("strict", "surrogateescape") and not passes:
        out.reconfigure(errors="replace")


def tell_before(note: str) -> list[str]:
    """Say what should be known before what takes a while; it is in a list, of what need not be said after it."""
    if not note:
        return []
    typer.echo(note, err=True)
    return [note]


def can_show(text: str) -> bool:
    """Whether standard output has all characters of a text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


_WHOLE = 10_000
"""Columns of a table whose rows are not to be broken."""


class NotPrinted(OSError):
    """Standard output takes no more: a pipe whose reader has ended, or a disk that is full."""


def not_printed(reason: OSError, where: str = "") -> NotPrinted:
    """What to raise where printing failed: it says where else things are. Standard output takes and drops all from now
    on, since what is left in its buffer would fail again, with a traceback, when Python ends.
    """
    with contextlib.suppress(OSError, ValueError):  # that of a test has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return NotPrinted(f"standard output takes no more ({reason.strerror}). {where}".rstrip())


@contextlib.contextmanager
def printing(where: str = "") -> Iterator[None]:
    """A block that prints; an error of the system in it is `NotPrinted`, and says where else things are."""
    try:
        yield
    except OSError as error:
        raise not_printed(error, where) from error


@contextlib.contextmanager
def then_printed(tell: Callable[[], None], where: str) -> Iterator[None]:
    """A block that writes what was measured, which is printed after it.

    Neither takes anything of the other: what cannot be written is printed, too, and is written before anything is
    printed that a closed pipe would end.

    Args:
        tell: prints it.
        where: the files that the block writes; the last line.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(NotPrinted), printing():  # it is the error of the block that is to be told
            tell()
        raise
    with printing(where):
        tell()
        typer.echo(where)


def console(whole: bool = False) -> Console:
    """Of standard output, for tables: names of files and methods are shown as they are, brackets and colons among them.

    Of rich's own, "[v2]" is markup, which is left out or ends the command, ":x:" an emoji, and a closed pipe the end,
    without a word.

    Args:
        whole: rows are on a line each where no terminal says how wide it is, as for a file or another program, which
            would find the names of files in pieces; COLUMNS goes before it. Otherwise there are 80 columns then.
    """
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # it is called where the error was caught

    made = Plain(markup=False, emoji=False)
    if whole and not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _WHOLE
    return made


def page_line(what: str, page: Path) -> str:
    """Where a page is, and its numbers."""
    return f"{what}: {page} (open it in a browser); numbers: {page.with_suffix('.json')}"


def command_line() -> str:
    """What was typed, for a shell."""
    return shlex.join(["vidaccel", *sys.argv[1:]])


def print_summary(
    videos: list[GeneratedVideo],
    files: dict[str, Path],
    comparison: Comparison | None = None,
    said: Sequence[str] = (),
) -> None:
    """Print a table of the runs, and which of them stayed dense against what was asked for.

    Args:
        videos: of the runs. files: name -> where they are.
        comparison: of them, if any.
        said: notes that were shown before the steps.
    """
    from rich.table import Table

    from ..generation.report.page import OVER_WHAT_DIFFERS, format_seconds

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("method")
    for title in ("time", "density", *(("PSNR", "SSIM") if comparison else ())):
        table.add_column(title, justify="right")
    skipping = any(video.account is not None and video.account.counts()["skipped"] for video in videos)
    if skipping:  # the density is of what was computed
        table.add_column("computed", justify="right")
    table.add_column("file", overflow="fold")
    for video in videos:
        density = "100 %" if video.report is None else f"{100 * video.report.mean_density():.0f} %"
        row = [video.name, format_seconds(video.seconds), density]
        if comparison:
            metrics = comparison.metrics.get(video.name)
            row += ["–", "–"] if metrics is None else [_psnr(metrics), f"{metrics.mean_ssim:.3f}"]
        if skipping:
            counts = None if video.account is None else video.account.counts()
            row.append("all" if counts is None else f"{counts['computed']} of {counts['forwards']}")
        table.add_row(*row, str(files[video.name]))
    console(whole=True).print(table)
    if comparison and any(metrics.leaves_out for metrics in comparison.metrics.values()):
        typer.echo(OVER_WHAT_DIFFERS)
    for note in dict.fromkeys(note for video in videos for note in video.notes):  # mostly of the same pictures
        if note not in said:
            typer.echo(note)
    for video in videos:
        if video.account is not None:
            typer.echo(f"{video.name}: {video.account.in_words()}.")
        if note := all_dense(video):
            typer.echo(note)
        if video.report is not None and (error := video.report.error_in_words()):
            typer.echo(f"{video.name}: {error}.")


def _psnr(metrics: FrameMetrics) -> str:
    from ..generation.report.page import format_psnr

    return format_psnr(metrics.mean_psnr, metrics.leaves_out)


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
