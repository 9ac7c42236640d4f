"""Tokens of all heads as the rows of one matrix, which torch moves whole and so several times faster."""

from __future__ import annotations

import torch


def token_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Tokens of `x [B, H, N, ...]` as rows `[B * H * N, ...]`, a view of what models hand over.

    They hold tokens before heads in memory, `[B, N, H, ...]`, and a copy in the order of x is one of the whole tensor.

    Returns:
        The rows; the row of the first token of each head, `[B, H, 1]` int64; and by how many rows tokens lie apart.
    """
    batch, heads, tokens = x.shape[:3]
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    if heads > 1 and tokens > 1 and x.transpose(1, 2).is_contiguous():
        return x.transpose(1, 2).flatten(0, 2), first + first // heads * heads * (tokens - 1), heads
    return x.flatten(0, 2), first * tokens, 1
