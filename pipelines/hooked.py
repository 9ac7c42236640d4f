"""A handle of hooks on the transformers of a pipeline, removable without a trace."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch

from .diffusers_hooks import hooks_of
from .removed import refuse_removed


class PassHook(Protocol):
    """What is on one transformer."""

    def install(self, transformer: Any) -> None:
        """Put it on."""

    def remove(self, transformer: Any) -> None:
        """Take it off."""


HookT = TypeVar("HookT", bound=PassHook)


def is_hooked(transformer: torch.nn.Module, *kinds: type[PassHook]) -> bool:
    """Whether a hook of one of these classes is on a transformer, of whatever pipeline that has it."""
    owners = (getattr(hook, "__self__", None) for hook in transformer._forward_pre_hooks.values())
    return any(isinstance(hook, kinds) for hook in (*hooks_of(transformer).values(), *owners))


class HookedPipeline(Generic[HookT]):
    """Hooks at work in a pipeline; a context manager that removes itself.

    Args:
        pipe: that has the transformers, and the handle as the attribute `attribute` while it is at work.
        hooked: the transformers by name, each with its hook, which is put on it: on all of them or on none.
    """

    attribute: ClassVar[str]

    def __init__(self, pipe: Any, hooked: dict[str, tuple[torch.nn.Module, HookT]]) -> None:
        self._pipe, self._hooked, self._active = pipe, hooked, True
        with contextlib.ExitStack() as undo:
            for transformer, hook in hooked.values():
                hook.install(transformer)
                undo.callback(hook.remove, transformer)
            undo.pop_all()
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
        refuse_removed(self._active, "what made it")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
