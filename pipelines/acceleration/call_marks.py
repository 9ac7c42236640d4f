"""Where a pipeline's calls begin and end: a video that is made chunk by chunk has several runs."""

from __future__ import annotations

from typing import Any

from .clock import StepClock
from .copies import CopiedNotPickled
from .in_place import InPlace, remove_from

BEGINNINGS = ("check_inputs", "prepare_latents")
"""What a pipeline calls once, before its runs: all of diffusers the first, but LTX for long videos the second."""
END = "maybe_free_model_hooks"
"""What it calls last."""


class _Mark(InPlace):
    """In the place of one of these methods. It is set on the pipeline, not on its class.

    Args:
        pipe: the pipeline. name: of the method.
    """

    def __init__(self, pipe: Any, name: str) -> None:
        self.clocks: list[StepClock] = []
        super().__init__(pipe, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = self._method()
        if self._name != END:
            for clock in self.clocks:
                clock.call_begins()
            try:
                return method(*args, **kwargs)
            except BaseException:
                for clock in self.clocks:
                    clock.call_ended()
                raise
        try:
            return method(*args, **kwargs)
        finally:
            for clock in self.clocks:
                clock.call_ended()


class CallMarks(CopiedNotPickled):
    """Tells a clock where the calls of a pipeline begin and end. Several clocks share what is set on the pipeline.

    A pipeline that does not say both, a modular one for example, is left as it is: each run is a call then.

    Args:
        pipe: the pipeline. clock: that is told.
    """

    def __init__(self, pipe: Any, clock: StepClock) -> None:
        self._clock = clock
        begin = next((name for name in BEGINNINGS if callable(getattr(pipe, name, None))), None)
        names = (begin, END) if begin is not None and callable(getattr(pipe, END, None)) else ()
        found = [(name, vars(pipe).get(name)) for name in names]
        self._marks = [m if isinstance(m, _Mark) and m.is_of(pipe) else _Mark(pipe, name) for name, m in found]
        for mark in self._marks:
            mark.clocks.append(clock)

    def remove(self) -> None:
        """Tell the clock no more. A second call does nothing."""
        for mark in self._marks:
            mark.clocks.remove(self._clock)
            if not mark.clocks:
                mark.remove()
        self._marks = []


def remove_call_marks(pipe: Any) -> None:
    """Take all of them out of a pipeline."""
    remove_from(pipe, *BEGINNINGS, END)
