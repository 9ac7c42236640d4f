"""Whether a call may have derivatives, and what is kept for a backward pass that may come."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Also in inference mode, make tensors that a later training step can use."""
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recorded):
        yield


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether gradients are recorded, and flow to one of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def may_have_gradients(module: torch.nn.Module, given: Any) -> bool:
    """Whether a forward pass of a module may have a backward pass: gradients are recorded, and a parameter or a tensor
    of what it is given, in whatever containers, wants one; or a layer has a `forward` or hook of somebody else's, whose
    parameters are not the module's."""
    if not torch.is_grad_enabled():
        return False
    leaves = (x for x in tree_leaves(given) if isinstance(x, torch.Tensor))
    if any(x.requires_grad for x in itertools.chain(module.parameters(), leaves)):
        return True
    return any(_is_replaced(part) for part in module.modules())


def _is_replaced(part: torch.nn.Module) -> bool:
    """Whether a module computes something else than its class says, as where a trainer puts a LoRA around it (kohya's
    set `forward`). Hooks of diffusers and accelerate replace it, too, and have no parameters."""
    if hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook"):
        return False
    is_leaf = next(part.children(), None) is None
    return "forward" in part.__dict__ or (is_leaf and bool(part._forward_hooks))


def transform_of(*tensors: torch.Tensor) -> str | None:
    """What is done to one of these beside the backward pass that autograd takes, as the beginning of a sentence.

    Operators of our own would leave out derivatives of forward mode (`torch.func.jvp`) without a word, and what else
    `torch.func` does ends in errors within them, or within torch's.
    """
    if torch.compiler.is_compiling():
        return None
    functorch = torch._C._functorch  # torch has no public function that tells
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "derivatives of forward mode (torch.func.jvp) are"
    if any(functorch.is_batchedtensor(x) for x in tensors):
        return "torch.func.vmap is"
    if any(functorch.is_gradtrackingtensor(x) for x in tensors):
        return "derivatives of torch.func (grad, vjp, jacrev) are"
    return None
