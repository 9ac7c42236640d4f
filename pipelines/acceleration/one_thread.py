"""One thread at a time in what remembers the steps of one run."""

from __future__ import annotations

import sys
import threading
from typing import Any
from weakref import ref

import torch

from ..hooks.running_pipeline import running_pipeline


class OneThread:
    """Refuses a forward pass while another thread is in one of the same transformer, or in the midst of a run.

    Two runs whose steps take turns are as wrong as two passes at once: one would go by the steps of the other. Read
    from the stack of the thread that came last, which alone knows: a run that was interrupted never said that it ended.
    """

    def __init__(self) -> None:
        self._thread: int | None = None
        self._pipe: ref[Any] | None = None  # whose call made the last pass; none outside of calls
        self._module: ref[torch.nn.Module] | None = None  # that was called in it
        self._lock = threading.Lock()  # or two that begin at once would not see each other
        self.refused = 0
        """Passes that were."""

    def enter(self, module: torch.nn.Module, name: str, goes_on: bool) -> None:
        """A pass begins in this thread.

        Args:
            module: that is called. name: of it in its pipeline.
            goes_on: the run of the last pass is to have more of them.

        Raises:
            RuntimeError: another thread is in its way.
        """
        with self._lock:
            if self.is_taken(module, goes_on):
                self.refused += 1
                raise RuntimeError(
                    f"{name} is called by two threads at once, and what sparse attention, caches and reports remember "
                    "is of one run: let one wait for the other (a threading.Lock around the pipeline's call), or give "
                    "each thread a pipeline with a transformer of its own, accelerated by itself."
                )
            pipe = running_pipeline()
            self._thread, self._pipe = threading.get_ident(), None if pipe is None else ref(pipe)
            self._module = ref(module)

    def is_taken(self, module: torch.nn.Module, goes_on: bool) -> bool:
        """Whether another thread is in the way of a pass in this one; arguments as of `enter`."""
        last = self._thread
        if last is None or last == threading.get_ident():
            return False
        return _calls(last, module) or (goes_on and self._is_in_its_call(last))

    def is_elsewhere(self, goes_on: bool) -> bool:
        """Whether the run of the last pass is another thread's, which this one must leave as it is.

        Args:
            goes_on: as of `enter`.
        """
        module = None if self._module is None else self._module()
        return module is not None and self.is_taken(module, goes_on)

    def _is_in_its_call(self, thread: int) -> bool:
        pipe = None if self._pipe is None else self._pipe()
        return pipe is not None and running_pipeline(thread) is pipe


def others_call(module: torch.nn.Module) -> bool:
    """Whether another thread than this one is in a call of a module now."""
    return any(_calls(thread, module) for thread in sys._current_frames() if thread != threading.get_ident())


def _calls(thread: int, module: torch.nn.Module) -> bool:
    """Whether a thread is in a call of a module now."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is torch.nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False
