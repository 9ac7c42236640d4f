"""How long a step takes, by the clock that all processes share."""

from __future__ import annotations


class Pace:
    """The seconds of a step in a phase, without the first one of this process, which may load and compile.

    Args:
        step: optimiser steps that were done in the phase before.
        seconds: that they took.
    """

    def __init__(self, step: int, seconds: float) -> None:
        self._before = (step, seconds)
        self._first: tuple[int, float] | None = None
        self._now = self._before

    def add(self, step: int, seconds: float) -> None:
        """A step was done: how many there are now, and what all of them took."""
        if self._first is None:
            self._first = (step, seconds)
        self._now = (step, seconds)

    @property
    def seconds_per_step(self) -> float | None:
        """Of the steps of this process, until there are two of those before it; None where there were none."""
        if self._first is not None and self._now[0] > self._first[0]:
            return (self._now[1] - self._first[1]) / (self._now[0] - self._first[0])
        step, seconds = self._before
        return seconds / step if step else None
