"""Models and pipelines that refuse to be saved while something is in them that would not load again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_SAVE = "save_pretrained"

TAKE_OUT = "call remove() on the handle (or vidaccel.restore(pipe)), save it, and do it again"
"""The fix where a handle put it there."""


class Unsaved:
    """Has `save_pretrained()` refuse. It is set on the object, not on its class, and several may be on one.

    Args:
        owner: a model or a pipeline of diffusers.
        why: it cannot be saved, with what to do; or what says so when it is to be saved, "" where it can be.
    """

    def __init__(self, owner: Any, why: str | Callable[[], str]) -> None:
        self._owner, self._why = owner, why
        there = vars(owner).get(_SAVE)
        refusal = there if isinstance(there, _Refusal) else _Refusal(owner, there)
        refusal.whys.append(why)
        setattr(owner, _SAVE, refusal)

    def remove(self) -> None:
        """Have it be saved again, unless another refuses. A second call does nothing."""
        if self._owner is None:
            return
        refusal = vars(self._owner).get(_SAVE)
        if isinstance(refusal, _Refusal):
            refusal.remove(self._why)
        self._owner, self._why = None, ""


class _Refusal:
    def __init__(self, owner: Any, former: Any) -> None:
        self._owner, self._former = owner, former  # the latter is what somebody else set there
        self.whys: list[str | Callable[[], str]] = []
        # With the signature of what it stands for: diffusers looks in it for what a part can be saved as.
        functools.update_wrapper(self, former or getattr(type(owner), _SAVE).__get__(owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self._owner)
        for why in reversed(self.whys):
            if said := why if isinstance(why, str) else why():
                raise RuntimeError(f"this {kind.__name__} cannot be saved as it is: {said}.")
        return (self._former or getattr(kind, _SAVE).__get__(self._owner))(*args, **kwargs)

    def remove(self, why: str | Callable[[], str]) -> None:
        if why in self.whys:
            self.whys.remove(why)
        if self.whys:
            return
        delattr(self._owner, _SAVE)
        if self._former is not None:
            setattr(self._owner, _SAVE, self._former)
