"""A handle of hooks on the transformers of a pipeline, removable without a trace."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch


class PassHook(Protocol):
    """What is on one transformer."""

    def remove(self, transformer: Any) -> None:
        """Take it off."""


HookT = TypeVar("HookT", bound=PassHook)


class HookedPipeline(Generic[HookT]):
    """Hooks at work in a pipeline; a context manager that removes itself.

    Args:
        pipe: that has the transformers, and the handle as the attribute `attribute` while it is at work.
        hooked: the transformers by name, each with its hook, which is on it.
    """

    attribute: ClassVar[str]

    def __init__(self, pipe: Any, hooked: dict[str, tuple[torch.nn.Module, HookT]]) -> None:
        self._pipe, self._hooked, self._active = pipe, hooked, True
        setattr(pipe, self.attribute, self)

    def remove(self) -> None:
        """Put the pipeline back as it was. A second call does nothing."""
        if not self._active:
            return
        self._active = False
        for transformer, hook in self._hooked.values():
            hook.remove(transformer)
        if getattr(self._pipe, self.attribute, None) is self:
            delattr(self._pipe, self.attribute)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
