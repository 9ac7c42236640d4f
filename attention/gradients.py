"""Whether a call may have a backward pass."""

from __future__ import annotations

import torch


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether gradients are recorded, and flow to one of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
