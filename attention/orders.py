"""Tokens in another order, and back."""

from __future__ import annotations

import torch

from .groups import repeat_heads
from .rows import token_rows


def permute(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Tokens of `x [B, H, N, ...]` in `order [1|B, 1|H, R]`, all or some of them; `None` leaves them.

    Where the order has more heads than x, x is repeated for them (`groups.repeat_heads`), in the same pass; and the
    order, where x has more.
    """
    if order is None:
        return x
    heads = max(x.shape[1], order.shape[1])
    rows, first, step = token_rows(x)
    flat = (repeat_heads(order, heads) * step + repeat_heads(first, heads)).flatten()
    return rows.index_select(0, flat).view(x.shape[0], heads, order.shape[-1], *x.shape[3:])


def unpermute(x: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Undo `permute`."""
    return x if order is None else permute(x, invert(order))


def invert(order: torch.Tensor) -> torch.Tensor:
    """The inverse permutation along the last dimension."""
    positions = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, positions)
