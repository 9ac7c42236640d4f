"""Whether a call may have derivatives, and what is kept for a backward pass that may come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd import forward_ad


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Also in inference mode, make tensors that a later training step can use."""
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recorded):
        yield


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether gradients are recorded, and flow to one of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def has_tangent(*tensors: torch.Tensor) -> bool:
    """Whether one of these carries a derivative of forward mode (`torch.func.jvp`)."""
    if torch.compiler.is_compiling():
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
