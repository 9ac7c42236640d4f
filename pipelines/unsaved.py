"""Models and pipelines that refuse to be saved while something is in them that would not load again."""

from __future__ import annotations

from typing import Any

_SAVE = "save_pretrained"

TAKE_OUT = "call remove() on the handle (or vidaccel.restore(pipe)), save it, and do it again"
"""The fix where a handle put it there."""


class Unsaved:
    """Has `save_pretrained()` refuse. It is set on the object, not on its class, and several may be on one.

    Args:
        owner: a model or a pipeline of diffusers.
        why: it cannot be saved, with what to do.
    """

    def __init__(self, owner: Any, why: str) -> None:
        self._owner, self._why = owner, why
        there = vars(owner).get(_SAVE)
        refusal = there if isinstance(there, _Refusal) else _Refusal(owner, there)
        refusal.whys.append(why)
        setattr(owner, _SAVE, refusal)

    def remove(self) -> None:
        """Have it be saved again, unless another refuses. A second call does nothing."""
        refusal = vars(self._owner).get(_SAVE)
        if isinstance(refusal, _Refusal) and self._why:
            refusal.remove(self._why)
        self._why = ""


class _Refusal:
    def __init__(self, owner: Any, former: Any) -> None:
        self._owner, self._former = owner, former  # the latter is what somebody else set there
        self.whys: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = type(self._owner)
        if self.whys:
            raise RuntimeError(f"this {kind.__name__} cannot be saved as it is: {self.whys[-1]}.")
        # Of a shallow copy of the owner, which still has this after all are gone.
        return (self._former or getattr(kind, _SAVE).__get__(self._owner))(*args, **kwargs)

    def remove(self, why: str) -> None:
        if why in self.whys:
            self.whys.remove(why)
        if self.whys:
            return
        delattr(self._owner, _SAVE)
        if self._former is not None:
            setattr(self._owner, _SAVE, self._former)
