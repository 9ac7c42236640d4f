"""Stopwatches that cost no synchronisation."""

from __future__ import annotations

import time

import torch


class Span:
    """Times a `with` block: the wall clock on the CPU, a pair of events on CUDA that are read later."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __enter__(self) -> Span:
        self._start = self._mark()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop = self._mark()

    def seconds(self) -> float:
        """The time between entering and leaving; waits for the GPU where there is one."""
        if not self._cuda:
            return self._stop - self._start
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1000

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
