"""The command line. One file a group of commands, which parses and prints; the work is elsewhere."""

from __future__ import annotations

import errno
import os
from typing import Annotated

import typer

from . import demo, generate, info, models, presets, tune
from .terminal import not_printed, show_what_can_be_shown

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """The entry point of the `vidaccel` command."""
    # Before torch is imported: OpenMP threads that spin between small operations make a small model many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    show_what_can_be_shown()
    try:
        app(prog_name="vidaccel")
    except OSError as error:
        if error.filename is not None or error.errno not in _OF_PRINTING:
            raise
        # Of a table or the help: commands that make files say so themselves.
        typer.echo(f"Error: {not_printed(error)}", err=True)
        raise SystemExit(1) from None


_OF_PRINTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
"""What a standard output that takes no more has for errors."""


def _print_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"vidaccel {__version__}")
        raise typer.Exit


@app.callback()
def common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Faster pre-trained video diffusion models: sparse attention, and deep-compression autoencoders."""


# In the order of `vidaccel --help`, which has groups of commands last.
for commands in (generate, demo, presets, tune, info, models):
    commands.register(app)
