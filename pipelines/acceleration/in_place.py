"""What is set on a pipeline in the place of one of its methods, and not on its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..hooks.running_pipeline import running_pipeline
from .copies import CopiedNotPickled


class InPlace(CopiedNotPickled):
    """In the place of a method of an object.

    A shallow copy of the object (`copy.copy`) has it, too: in a call of the copy, the copy's own method is run. One
    that is still there when the original has got its own back goes in the copy's next call, or by `restore`.

    Args:
        owner: the pipeline, or the loop of a modular one.
        name: of the method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name, self._removed = owner, name, False
        former = vars(owner).get(name)
        # What somebody else set there, or set on the object that this one is a shallow copy of.
        self._former: Any = former._former if isinstance(former, InPlace) and not former.is_of(owner) else former
        setattr(owner, name, self)

    def is_of(self, owner: Any) -> bool:
        """Whether it was set on this object, and not on one that this is a shallow copy of."""
        return self._owner is owner

    def _method(self) -> Callable[..., Any]:
        """The method that it is in the place of."""
        running = running_pipeline()
        owner = running if running is not None and vars(running).get(self._name) is self else self._owner
        if self._removed:
            self._leave(owner)
        method: Callable[..., Any] = self._former or getattr(type(owner), self._name).__get__(owner)
        return method

    def remove(self) -> None:
        """Give the object back what it had. A second call does nothing."""
        self._removed = True
        self._leave(self._owner)

    def _leave(self, owner: Any) -> None:
        if vars(owner).get(self._name) is not self:
            return
        if self._former is None:
            delattr(owner, self._name)
        else:
            setattr(owner, self._name, self._former)


def remove_from(owner: Any, *names: str) -> None:
    """Give an object, or a shallow copy of one, back what it had in the places of these methods."""
    for name in names:
        found = vars(owner).get(name)
        if isinstance(found, InPlace):
            found.remove()
            found._leave(owner)
