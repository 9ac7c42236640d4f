"""A handle of hooks on the transformers of a pipeline, removable without a trace; whose hooks are on a transformer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar, runtime_checkable

import torch

from ..acceleration.copies import CopiedNotPickled
from .diffusers_hooks import hooks_of
from .removed import refuse_removed
from .replaced import Replaced


class HandleOf(CopiedNotPickled):
    """The handle that something on a transformer is of. Known by the pipeline that it was made with, so that a copy of
    the pipeline has its own, and one of the transformer alone has none.

    Args:
        pipe: that has the handle while it is at work. attribute: of the pipeline, which holds it.
    """

    def __init__(self, pipe: Any, attribute: str) -> None:
        self._pipe, self.attribute = pipe, attribute

    def __call__(self) -> Any | None:
        return getattr(self._pipe, self.attribute, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> HandleOf:
        return HandleOf(memo.get(id(self._pipe)), self.attribute)


@runtime_checkable
class PassHook(Protocol):
    """What is on one transformer."""

    handle: HandleOf

    def install(self, transformer: Any) -> None:
        """Put it on."""

    def remove(self, transformer: Any) -> None:
        """Take it off."""


HookT = TypeVar("HookT", bound=PassHook)


def hooks_on(transformer: torch.nn.Module) -> Iterator[Any]:
    """What is on a transformer itself: hooks of diffusers, and what has methods as torch's hooks before a pass."""
    yield from hooks_of(transformer).values()
    yield from (getattr(hook, "__self__", None) for hook in transformer._forward_pre_hooks.values())


def is_hooked(transformer: torch.nn.Module, *kinds: type[PassHook]) -> bool:
    """Whether a hook of one of these classes is on a transformer, of whatever pipeline that has it."""
    return any(isinstance(hook, kinds) for hook in hooks_on(transformer))


def handles_on(transformer: torch.nn.Module, attribute: str) -> list[Any]:
    """The handles of what is on a transformer, of whatever pipeline that has it.

    Args:
        transformer: without what wraps it.
        attribute: of pipelines, which holds the handles that are looked for.
    """
    known = [each.handle for each in hooks_on(transformer) if isinstance(getattr(each, "handle", None), HandleOf)]
    return [handle for of in known if of.attribute == attribute and (handle := of()) is not None]


def take_off_alone(transformer: torch.nn.Module) -> None:
    """Take the hooks off a transformer that have no handle, as of a copy without its pipeline."""
    for hook in list(hooks_on(transformer)):
        of = getattr(hook, "handle", None)
        if isinstance(of, HandleOf) and of() is None and isinstance(hook, PassHook):
            hook.remove(transformer)


class HookedPipeline(Generic[HookT]):
    """Hooks at work in a pipeline; a context manager that removes itself.

    Args:
        pipe: that has the transformers, and the handle as the attribute `attribute` while it is at work.
        hooked: the transformers by name, each with its hook, which is put on it: on all of them or on none.
    """

    attribute: ClassVar[str]
    function: ClassVar[str]
    """Of this package, which makes the handle."""
    without: ClassVar[str]
    """What a transformer does that has no such hook, for messages."""

    def __init__(self, pipe: Any, hooked: dict[str, tuple[torch.nn.Module, HookT]]) -> None:
        self._pipe, self._hooked, self._active = pipe, hooked, True
        self._replacements = Replaced(pipe, self.function, self.without, f"call {self.function} again")
        with contextlib.ExitStack() as undo:
            for transformer, hook in hooked.values():
                hook.handle = HandleOf(pipe, self.attribute)
                hook.install(transformer)
                undo.callback(hook.remove, transformer)
            undo.pop_all()
        setattr(pipe, self.attribute, self)

    def _replaced(self) -> list[str]:
        """What to say of transformers that the pipeline has no more; nothing once this is removed."""
        hooked = self._hooked if self._active else {}
        return self._replacements.notes({name: transformer for name, (transformer, _) in hooked.items()})

    def remove(self) -> None:
        """Put the pipeline back as it was. A second call does nothing."""
        if not self._active:
            return
        self._replaced()  # who never asks for notes hears of it here at the latest
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
