"""Errors that a user can act on, as one line on the command line and an exit code."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ..generation.errors import BadInput
from ..generation.packages import check_command_line
from ..pipelines.files.whole_files import NotWritten
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


_ENDINGS = ("SIGTERM", "SIGHUP")
"""Signals that end a process at once, unless it takes them. SIGHUP is sent where a terminal is closed."""


class _Terminated(SystemExit):
    """One of `_ENDINGS` came; the code is that of the process."""


@contextlib.contextmanager
def _endings() -> Iterator[None]:
    """Raise `_Terminated` on such a signal: at once means without a word, with the encoder still at work, and with the
    temporary file of a half-written video left. One that is ignored stays so, as nohup has it.
    """
    came: list[int] = []

    def terminate(number: int, _: Any) -> None:
        came.append(number)
        raise _Terminated(128 + number)

    here = [getattr(signal, name) for name in _ENDINGS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in here}
    taken = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, terminate)
    try:
        yield
    except (Exception, SystemExit) as error:
        said = getattr(error, "exit_code", None) == 128 + came[0] if came else False
        if came and not said:  # on the way out a progress bar may have written to a terminal that is closed
            raise _Terminated(128 + came[0]) from error
        raise
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def one_line_errors(
    interrupted: Callable[[], str] = lambda: _LOST,
    arguments: Collection[str] = (),
    options: Collection[str] = (),
    by_blocks: bool = False,
    with_models: bool = True,
) -> Iterator[None]:
    """What a user can act on becomes one line: exit 2 for bad input, 1 for a failed run or write, 130 for Ctrl-C,
    143 for SIGTERM, 129 for SIGHUP.

    That is every error of a class of this package, of the system, and where memory ran out. Others are faults of the
    program and pass.

    Args:
        interrupted: what to say after Ctrl-C or such a signal.
        arguments: fields of the request that are arguments of the command, where others have an option.
        options: those that are options of it, where others have an argument.
        by_blocks: the option for `offload` that was given is that by blocks.
        with_models: the command reads models, so all packages of the command line are asked for first.
    """

    def name(field: str) -> str:
        if by_blocks and field == "offload":
            return option("offload_blocks")
        if field in options:
            return f"--{field}"
        return field.upper() if field in arguments else option(field)

    import typer

    try:
        with _endings():
            if with_models:
                check_command_line()
            yield
    except (KeyboardInterrupt, _Terminated) as stop:
        with contextlib.suppress(OSError):  # of a terminal that is closed
            typer.echo(interrupted(), err=True)
        raise typer.Exit(int(stop.code) if isinstance(stop, _Terminated) else 128 + signal.SIGINT) from None
    except (ValueError, RuntimeError, OSError, MemoryError) as raised:
        error = not_printed(raised) if isinstance(raised, BrokenPipeError) else raised
        message = error.worded(name) + _HINTS.get(error.field, "") if isinstance(error, BadInput) else str(error)
        if isinstance(error, NotWritten):
            message += " Files that were written before it are whole."
        if full := _out_of_memory(error):
            message = full
        elif type(error).__module__.partition(".")[0] != __name__.partition(".")[0] and not isinstance(error, OSError):
            raise
        with contextlib.suppress(OSError):
            typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
