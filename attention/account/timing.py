"""Stopwatches that cost no synchronisation."""

from __future__ import annotations

import time
from typing import Any

import torch


def event_class(device: torch.device) -> type | None:
    """The timing event of a device, such as `torch.mps.Event`; None where work is done when its call returns."""
    if device.type in ("cpu", "meta"):
        return None
    return getattr(getattr(torch, device.type, None), "Event", None)


class Span:
    """Times a `with` block: the wall clock on the CPU, a pair of events on a GPU of any make that are read later."""

    def __init__(self, device: torch.device) -> None:
        self._event, self._device = event_class(device), device

    def __enter__(self) -> Span:
        self._start = self._mark()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop = self._mark()

    def seconds(self) -> float:
        """The time between entering and leaving; waits for the GPU where there is one."""
        if self._event is None:
            return self._stop - self._start
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1000

    def _mark(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        if self._device.type == "mps":  # one device; its events are of the stream that is the current one
            event.record()
        else:  # not of the device that is the current one
            event.record(getattr(torch, self._device.type).current_stream(self._device))
        return event
