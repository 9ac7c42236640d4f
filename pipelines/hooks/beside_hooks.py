"""What changes the forward pass of a module, put on and taken out beside what others have put there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .diffusers_hooks import hooks_of


@contextlib.contextmanager
def beside_hooks(model: nn.Module) -> Iterator[None]:
    """Within, hooks of diffusers are put on a model and its parts, or are taken out: beneath offloading by accelerate.

    accelerate keeps the forward that it found, and puts it back when it goes, which pipelines whose models are
    offloaded whole have it do after each call: what lay above would go with it. diffusers puts the forward back from
    before its hook: accelerate's would go with that. And of two hooks of diffusers that both have a forward of their
    own, the later one would lose its own with the earlier.
    """
    above: dict[Any, Any] = {
        module: (module.forward, module.__dict__.pop("_hf_hook"))  # which cache-dit would call, too
        for module in model.modules()
        if _offloading_is_outermost(module)
    }
    for module in above:
        module.forward = module._old_forward
    own = {reference: reference.forward for reference in _with_own_forward(model)}
    try:
        yield
    finally:
        for reference in _with_own_forward(model):
            if reference.forward is not own.get(reference, reference.forward):
                reference.original_forward, reference.forward = reference.forward, own[reference]
        for module in model.modules():
            if _keeps_its_class_forward(module):
                del module.forward
        for module, (forward, hook) in above.items():
            module._old_forward, module.forward, module._hf_hook = module.forward, forward, hook


def _offloading_is_outermost(module: nn.Module) -> bool:
    forward = getattr(module.__dict__.get("forward"), "func", None)
    known = {"_hf_hook", "_old_forward"} <= module.__dict__.keys()
    return known and getattr(forward, "__module__", "") == "accelerate.hooks"


def _keeps_its_class_forward(module: nn.Module) -> bool:
    """Whether diffusers put the forward of the class back where it had none of its own, with its last hook."""
    forward = module.__dict__.get("forward")
    of_class = getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    return of_class and "_diffusers_hook" in module.__dict__ and not hooks_of(module)


def _with_own_forward(model: nn.Module) -> Iterator[Any]:
    """Of the hooks of diffusers that have a forward of their own, where they keep it and that of before."""
    for module in model.modules():
        for hook in hooks_of(module).values():
            if hook.fn_ref.original_forward is not None:
                yield hook.fn_ref
