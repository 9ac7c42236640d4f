"""Whether a call may have a backward pass, and what is kept for one that may come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Also in inference mode, make tensors that a later training step can use."""
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recorded):
        yield


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether gradients are recorded, and flow to one of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
