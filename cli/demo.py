"""`vidaccel demo`: what this package gains on the CPU of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import one_line_errors
from .options import Threads, use_threads
from .terminal import command_line, console, page_line, tell_before, then_printed

if TYPE_CHECKING:
    from ..generation.showcase.measured import Showcase

PROMPT = "a blue triangle moves right on a white background"


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("demo")(demo_command)


def demo_command(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")] = PROMPT,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page; its numbers and pictures go beside it.")] = Path(
        "demo.html"
    ),
    seed: Annotated[int, typer.Option(help="Of the initial noise.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often each lever is measured, in turns.")] = 3,
    long_step: Annotated[
        bool, typer.Option("--long-step/--no-long-step", help="Measure a step of a long video with sparse attention.")
    ] = True,
    threads: Threads = None,
) -> None:
    """Make a video with the built-in models, and a page that shows what each lever gains on this CPU."""
    with one_line_errors():
        from ..generation.media.video import check_encoder
        from ..generation.models.places import DEMOS
        from ..generation.outputs import check_file, check_files
        from ..generation.requests.prompts import unknown_note
        from ..generation.showcase.measured import showcase
        from ..generation.showcase.page import write_showcase

        check_file("out", out, ".html")
        check_files("out", out, [out, out.with_suffix(".json"), out.with_suffix(".png")], {})
        check_encoder()  # the page has videos in it
        use_threads(threads)
        tell_before(unknown_note(DEMOS[0], prompt))
        made = showcase(
            prompt,
            seed,
            rounds=rounds,
            long_step=long_step,
            on_method=lambda name: typer.echo(f"a step of a long video: {name}", err=True),
        )
        with then_printed(lambda: _print(made), page_line("page", out)):
            write_showcase(made, out, command_line())


def _print(made: Showcase) -> None:
    from rich.table import Table

    from ..generation.report.page import format_seconds
    from ..generation.showcase.page import NAMES

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("lever")
    for title in ("a video", "plain/this", "prompts right"):
        table.add_column(title, justify="right")
    for number, (row, accuracy) in enumerate(zip(made.waterfall.rows, made.accuracy, strict=True)):
        name = NAMES.get(row.stage.name, (row.stage.name, ""))[0]
        told = "–" if accuracy is None else f"{accuracy.right} of {accuracy.prompts}"
        gain = f"{made.waterfall.gain(row):.2f}" if number else "–"
        table.add_row(f"+ {name}" if number else name, format_seconds(row.median), gain, told)
    shown = console(whole=True)
    shown.print(table)
    if made.steps:
        dense = made.steps["dense"].seconds
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("method")
        table.add_column(f"a step at {made.tokens:,} tokens", justify="right")
        table.add_column("dense/this", justify="right")
        for name, times in made.steps.items():
            gain = f"{dense / times.seconds:.2f}" if name != "dense" else "–"
            table.add_row(name, format_seconds(times.seconds), gain)
        shown.print(table)
    typer.echo(made.in_words())
