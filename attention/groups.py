"""Grouped-query attention: query heads in groups, each of which shares one head of keys and values.

Of H query heads and Hkv key-value heads, where H is a multiple of Hkv, query head h reads key-value head
`h // (H // Hkv)`, as with torch's `enable_gqa`. The rows of the query heads of a group are to its keys what the rows of
one longer head would be, so most of attention and planning needs no copy of k and v for each query head. With as many
heads of one as of the other, everything here returns what it was given.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`x [B, Hkv, ...]` with one head for each of `heads` query heads: a view where Hkv is 1, else a copy."""
    if x.shape[1] == heads:
        return x
    if x.shape[1] == 1:
        return x.expand(-1, heads, *x.shape[2:])
    return x.repeat_interleave(heads // x.shape[1], 1)


def by_group(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`x [B, H, R, ...]` as `[B, Hkv, H / Hkv * R, ...]`: the rows of the heads of a group, head after head."""
    return x if x.shape[1] == kv_heads else x.reshape(x.shape[0], kv_heads, -1, *x.shape[3:])


def by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`x [B, Hkv, H / Hkv * R, ...]` as `[B, H, R, ...]`: undo `by_group`."""
    return x if x.shape[1] == heads else x.reshape(x.shape[0], heads, -1, *x.shape[3:])


def group_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`x [B, H, R, K] @ y [B, Hkv, K, M]`, each head of y for the heads of its group: `[B, H, R, M]`."""
    return by_head(by_group(x, y.shape[1]) @ y, x.shape[1])


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """torch's `scaled_dot_product_attention` of `q [B, H, Nq, D]` with `k, v [B, Hkv, Nk, D]`.

    Not by its `enable_gqa`, which some of torch's kernels lack: they repeat k and v, or hold all scores.
    """
    out = F.scaled_dot_product_attention(by_group(q, k.shape[1]), k, v, scale=scale)
    return by_head(out, q.shape[1])
