"""A command in several processes, one for each GPU: started here, or by torchrun."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..generation.errors import BadInput
from ..generation.processes import Process

if TYPE_CHECKING:
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

GRACE = 5.0
"""Seconds that the others have to end by themselves, when one has failed."""
BAD_INPUT = 2
"""Exit code of `one_line_errors`."""
SHOWN = 20
"""Last lines of what a process said that failed."""


def to_start(wanted: int | None, process: Process) -> int:
    """How many processes a command has to start: none where it was started as one of them.

    Raises:
        BadInput: the number that is asked for is none, or not that of those which were started.
    """
    if wanted is not None and wanted < 1:
        raise BadInput("processes", "it must be at least 1", value=wanted)
    if process.count == 1:
        return 0 if wanted in (None, 1) else wanted
    if wanted not in (None, process.count):
        raise BadInput("processes", f"{process.count} were started", "Leave it out.", value=wanted)
    return 0


def start(count: int) -> int:
    """Run this very command in so many processes of this machine, and wait for them.

    The first one speaks for all. What another one says is shown where it failed, but for bad input, which all find.

    Returns:
        The exit code: 0, or that of the first one that failed.
    """
    import torch.multiprocessing as mp
    from torch.distributed.elastic.utils.distributed import get_free_port
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

    # As torchrun does, which takes one: each process has its share of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with tempfile.TemporaryDirectory(prefix="vidaccel-") as folder:
        given = (count, get_free_port(), folder)
        processes = mp.start_processes(_work, given, nprocs=count, join=False, start_method="spawn")
        assert processes is not None
        try:
            while not processes.join(grace_period=GRACE):
                pass
        except (ProcessExitedException, ProcessRaisedException) as failed:
            _tell(failed, processes.processes[0].exitcode, count, folder)
            return max(getattr(failed, "exit_code", 1), 1)
        except KeyboardInterrupt:  # the first process tells
            return 128 + signal.SIGINT
        except SystemExit as stopped:  # by SIGTERM, see `one_line_errors`
            return int(stopped.code or 1)
        finally:
            _end(processes.processes)
    return 0


def _end(processes: Sequence[Any]) -> None:
    """Leave none of these behind: one that waits for another within a collective takes no signal but the last."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _work(rank: int, count: int, port: int, folder: str) -> None:
    """One of the processes; the command is in `sys.argv`, as in the one that started it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank:
        with open(_log(folder, rank), "wb") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
    assert __package__ is not None
    runpy.run_module(__package__, run_name="__main__")


def _tell(failed: ProcessExitedException | ProcessRaisedException, first: int | None, count: int, folder: str) -> None:
    """Say what ended the process that failed, where it has not been said.

    Args:
        failed: of it. first: exit code of the first process, which finds bad input too. count: of processes.
        folder: of what the others said.
    """
    number = failed.error_index
    if not hasattr(failed, "signal_name"):  # an error that is none of this package's: with its traceback
        typer.echo(f"Process {number} of {count}: {failed}", err=True)
    elif failed.signal_name:
        why = ", as the system does where memory runs out" if failed.signal_name == "SIGKILL" else ""
        typer.echo(f"Error: process {number} of {count} was ended by {failed.signal_name}{why}.", err=True)
    elif number and first != BAD_INPUT:
        said = _log(folder, number).read_text(errors="replace").splitlines()
        typer.echo("\n".join([f"Process {number} of {count}:", *said[-SHOWN:]]), err=True)


def _log(folder: str, rank: int) -> Path:
    return Path(folder, f"{rank}.log")


@contextlib.contextmanager
def speaking(first: bool) -> Iterator[None]:
    """Whether what is printed is shown: only one process speaks for all, but for errors."""
    if first:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
