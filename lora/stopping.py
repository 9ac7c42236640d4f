"""Ctrl-C, SIGTERM and SIGUSR1: a request that training sees between micro-batches, and that ends all else at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

__all__ = ["SIGNALS", "StopRequested", "StopSignals", "Stopped"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
"""Those that ask for a stop. SIGUSR1 is what Slurm sends some time before it ends a job (`--signal=USR1@120`)."""


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
        """Take the signals inside the block. Where Python cannot (not in the main thread), it changes nothing."""
        previous = {}
        try:
            for number in SIGNALS:
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
        # Not print: the signal may have interrupted one.
        os.write(2, f"{signal.Signals(number).name}: {what}.\n".encode())
        if self._at_once:
            raise StopRequested
