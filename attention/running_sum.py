"""Running sums of numbers that are no integers."""

from __future__ import annotations

import torch


def running_sum(x: torch.Tensor) -> torch.Tensor:
    """`x.cumsum(-1)`, also under `torch.use_deterministic_algorithms`, where torch refuses it on a GPU: there the order
    in which it adds changes from call to call.
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return sum_by_doubling(x)
    return x.cumsum(-1)


def sum_by_doubling(x: torch.Tensor) -> torch.Tensor:
    """Running sums over the last dimension, in as many passes as its length has bits (Hillis and Steele, 1986)."""
    reach = 1
    while reach < x.shape[-1]:
        x = torch.cat([x[..., :reach], x[..., reach:] + x[..., :-reach]], -1)
        reach *= 2
    return x
