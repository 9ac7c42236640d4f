"""Errors that a user can act on, as one line on the command line and an exit code."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ..generation.errors import BadInput
from ..generation.packages import check_command_line
from ..pipelines.whole_files import NotWritten
from .terminal import not_printed

_NAMES = {
    "prompt": "PROMPT",
    "settings": "--set",
    "pipeline_options": "--pipeline-option",
    "tiling": "--vae-tiling",
    "levers": "--lever",
    "methods": "--method",
    "caches": "--cache",
    "adapters": "--adapter",
    "seeds": "--seed",
    "source": "SOURCE",
    "target": "TARGET",
}
_LOST = "Interrupted: what was at work was not written."
_HINTS = {"backend": " `vidaccel info` says which can run here."}


def option(field: str) -> str:
    """What a field of the request is called on the command line; an environment variable has its own name."""
    if field.isupper():
        return field
    return _NAMES.get(field, "--" + field.replace("_", "-"))


def _out_of_memory(error: Exception) -> str:
    """What to do where an error says that memory ran out; "" for another error."""
    less = "--vae-tiling where it was in decoding; fewer --frames or a smaller size."
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory: try --offload, or --offload-blocks where the transformer alone is too large; " + less
    # Torch has no class of its own for that of a CPU, and other words on Windows.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error):
        return f"out of main memory: try --dtype bfloat16, in which weights take half as much as in float32; {less}"
    return ""


class _Terminated(SystemExit):
    """SIGTERM came."""


@contextlib.contextmanager
def one_line_errors(
    interrupted: Callable[[], str] = lambda: _LOST,
    arguments: Collection[str] = (),
    by_blocks: bool = False,
    with_models: bool = True,
) -> Iterator[None]:
    """What a user can act on becomes one line: exit 2 for bad input, 1 for a failed run or write, 130 for Ctrl-C,
    143 for SIGTERM.

    That is every error of a class of this package, of the system, and where memory ran out. Others are faults of the
    program and pass.

    Args:
        interrupted: what to say after Ctrl-C or SIGTERM.
        arguments: fields of the request that are arguments of the command, where others have an option.
        by_blocks: the option for `offload` that was given is that by blocks.
        with_models: the command reads models, so all packages of the command line are asked for first.
    """

    def name(field: str) -> str:
        if by_blocks and field == "offload":
            return option("offload_blocks")
        return field.upper() if field in arguments else option(field)

    import typer

    def terminate(*_: Any) -> None:
        raise _Terminated(128 + signal.SIGTERM)

    # Without this, SIGTERM ends the process at once, without a word, and leaves the temporary file of a half-written
    # video.
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        if with_models:
            check_command_line()
        yield
    except (KeyboardInterrupt, _Terminated) as stop:
        typer.echo(interrupted(), err=True)
        number = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from None
    except (ValueError, RuntimeError, OSError, MemoryError) as raised:
        error = not_printed(raised) if isinstance(raised, BrokenPipeError) else raised
        message = error.worded(name) + _HINTS.get(error.field, "") if isinstance(error, BadInput) else str(error)
        if isinstance(error, NotWritten):
            message += " Files that were written before it are whole."
        if full := _out_of_memory(error):
            message = full
        elif type(error).__module__.partition(".")[0] != __name__.partition(".")[0] and not isinstance(error, OSError):
            raise
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
    finally:
        signal.signal(signal.SIGTERM, before)
