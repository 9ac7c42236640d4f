"""Signals that ask for a stop: training sees it between micro-batches, and all else ends at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
from collections.abc import Iterator
from typing import Any

__all__ = ["SIGNALS", "StopRequested", "StopSignals", "Stopped"]

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    *(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)),  # not on Windows
)
"""Those that ask for a stop. SIGHUP is sent where a terminal is closed. SIGUSR1 is what Slurm sends some time before it
ends a job (`--signal=USR1@120`)."""
HANG_UP = getattr(signal, "SIGHUP", None)
PATIENCE = 200  # milliseconds that the other end is given to go


class Stopped(Exception):
    """The run was asked to stop; the message says what was kept and how to go on."""


class StopRequested(KeyboardInterrupt):
    """A stop was asked for; the trainer turns it into `Stopped`."""


class StopSignals:
    """Whether the process was asked to stop by one of `SIGNALS`.

    Attributes:
        requested: True after the first signal.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = self._warned = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals inside the block, but for a SIGHUP that nohup has ignored. Where Python cannot (not in the
        main thread), it changes nothing."""
        previous = {}
        try:
            for number in SIGNALS:
                if number == HANG_UP and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                previous[number] = signal.signal(number, self._take)
        except ValueError:
            pass
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that holds no training state: a signal ends it where it is.

        Raises:
            StopRequested: on a signal, also on one that came before the block.
        """
        outer, self._at_once = self._at_once, True
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            self._at_once = outer

    def _take(self, number: int, _: Any) -> None:
        self._leave_what_is_gone(number == HANG_UP)
        if self.requested:
            if number not in (signal.SIGINT, signal.SIGTERM):
                return  # a warning that comes twice, as from Slurm to the step and by way of the script
            # torchrun forwards what its processes may have got from the terminal or from Slurm already, and kills what
            # takes too long by itself: there, the second signal is the same request. So is the SIGTERM with which Slurm
            # follows its warning.
            follows, self._warned = self._warned and number == signal.SIGTERM, False
            if not follows and "TORCHELASTIC_RUN_ID" not in os.environ:
                raise KeyboardInterrupt
            return
        self.requested, self._warned = True, number not in (signal.SIGINT, signal.SIGTERM)
        what = "the run ends" if self._at_once else "the run ends after this micro-batch, and what was trained is saved"
        with contextlib.suppress(OSError):  # of what reads a pipe, which had the signal, too
            # Not print: the signal may have interrupted one.
            os.write(2, f"{signal.Signals(number).name}: {what}.\n".encode())
        if self._at_once:
            raise StopRequested

    @staticmethod
    def _leave_what_is_gone(hung_up: bool) -> None:
        """Write nowhere from now on where that would fail, before the checkpoint is whole.

        That is a terminal that is closed, or a pipe whose reader (`| tee log`) the same signal ends.

        Args:
            hung_up: the signal says that a terminal is closed.
        """
        if not hasattr(select, "poll"):  # Windows
            return
        for number in (1, 2):
            try:
                waits = hung_up or stat.S_ISFIFO(os.fstat(number).st_mode)
            except OSError:  # closed by who started this
                continue
            poll = select.poll()
            poll.register(number, 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(PATIENCE if waits else 0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
