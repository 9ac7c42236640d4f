"""Where a pipeline's loop over its steps ends, by whatever: what methods remember of a run has no more use there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

from .clock import StepClock
from .in_place import InPlace, remove_from

NAME = "progress_bar"


def loops_of(pipe: Any) -> list[Any]:
    """What makes progress bars around loops: an ordinary pipeline itself, of a modular one its blocks that are loops.

    There is none for a transformer alone.
    """
    if callable(getattr(pipe, NAME, None)):
        return [pipe]
    found, left = [], [getattr(pipe, "_blocks", None)]
    while left:
        block = left.pop()
        if callable(getattr(block, NAME, None)):
            found.append(block)
        left.extend((getattr(block, "sub_blocks", None) or {}).values())
    return found


class LoopEnd(InPlace):
    """In the place of a pipeline's `progress_bar`, of which every pipeline of diffusers makes one around its loop.

    A run that was interrupted (`pipe.interrupt`, Ctrl-C) or that failed has no last pass that its end could be told by,
    and gigabytes would stay until the next run, in the way of decoding or of a second attempt at a smaller size. It is
    set on the pipeline, not on its class.

    Args:
        pipe: the pipeline, or the loop of a modular one.
        clock: that tells its steps, and what forgets.
    """

    def __init__(self, pipe: Any, clock: StepClock) -> None:
        self._clock = clock
        super().__init__(pipe, NAME)

    def __call__(self, *args: Any, **kwargs: Any) -> _Bar:
        make = self._method()
        self._clock.walks(kwargs.get("iterable", args[0] if args else None))
        return _Bar(make(*args, **kwargs), self._clock)


def remove_loop_ends(pipe: Any) -> None:
    """Take every `LoopEnd` out of a pipeline."""
    for loop in loops_of(pipe):
        remove_from(loop, NAME)


class _Bar:
    """A progress bar that tells a clock when it is left."""

    def __init__(self, bar: Any, clock: StepClock) -> None:
        self._bar, self._clock = bar, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        self._clock.stopped()
        if error and error[0] is not None:  # then nothing comes after the loop
            self._clock.call_ended()
        return self._bar.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._bar
        finally:
            self._clock.stopped()

    def close(self) -> None:
        """The end of a loop that moves the bar by hand and leaves no block (LTX-2 with dynamic frame rates)."""
        self._clock.stopped()
        self._bar.close()
