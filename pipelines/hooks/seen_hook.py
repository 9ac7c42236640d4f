"""Forward hooks that code which torch compiled before they came does not pass over."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..acceleration.copies import CopiedNotPickled

LOOKS_AT_CLASSES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
"""Whether compiled code sees that a module within the compiled one is of another class."""


class SeenHook(CopiedNotPickled):
    """A forward hook on a module, seen by compiled code too.

    What torch has compiled does not look at the hooks of modules again (its setting `skip_nnmodule_hook_guards`), so a
    hook that comes later would be passed over without a word, and one that went would still count. It does look at
    their classes: for as long as the hook is there, the module is of a subclass that adds nothing. Modules with the
    same hook share one, so that blocks which are alike stay one graph. Before 2.12 torch looks at the classes of
    modules within a compiled one no more than at their hooks, so there all is compiled anew.

    Args:
        module: that gets the hook.
        hook: a method, as `register_forward_hook` takes it, or `register_forward_pre_hook`.
        before: it comes before the pass.
    """

    def __init__(self, module: nn.Module, hook: Callable[..., Any], *, before: bool = False) -> None:
        self._module = module
        self._handle = (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
        self._kind = type(module)
        self._own = module.__class__ = _with_hook(self._kind, getattr(hook, "__func__", hook))
        _look_again()

    def remove(self) -> None:
        """Take the hook away, and the class, unless somebody has made another of it since (FSDP does)."""
        self._handle.remove()
        if type(self._module) is self._own:
            self._module.__class__ = self._kind
        _look_again()


def _look_again() -> None:
    if not LOOKS_AT_CLASSES and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


_made: dict[tuple[type, Callable[..., Any]], type] = {}


def _with_hook(kind: type, hook: Callable[..., Any]) -> type:
    """A subclass of `kind` for modules that have `hook`, whatever object it is a method of."""
    if (kind, hook) not in _made:
        facts = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        _made[kind, hook] = type(kind.__name__, (kind,), facts)
    return _made[kind, hook]
