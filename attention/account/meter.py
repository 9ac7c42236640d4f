"""The true error of sparse calls, measured on some of their queries."""

from __future__ import annotations

import torch

from ..groups import group_product
from ..heads import ALL_HEADS, HeadShare

CHUNK_BYTES = 2**28  # keys, values and scores of so many heads at a time


def check_rows(rows: int) -> int:
    """The number of queries to measure; raises a `ValueError` for one that is none."""
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise ValueError(
            f"measure_error is {rows!r}: it counts the queries of each sparse call whose error is measured, 0 or more; "
            "64 is enough for a layer and step, 0 measures nothing."
        )
    return rows


def sample_rows(tokens: int, rows: int, turn: int, device: torch.device) -> torch.Tensor:
    """Queries spread over a sequence: one at a pseudo-random place in each of `rows` equal parts, or all.

    A fixed distance could fall on one column of every frame. The places come from whole numbers alone, so that they
    need no generator, whose state would be the user's, and no wait for a device.

    Args:
        tokens: of the sequence.
        rows: how many are wanted.
        turn: other places for another number.

    Returns:
        `[min(rows, tokens)]` int64, rising.
    """
    count = min(rows, tokens)
    part = torch.arange(count + 1, device=device) * tokens // count
    start, width = part[:-1], part[1:] - part[:-1]
    mixed = (torch.arange(count, device=device) + 1 + 7919 * turn) * 2654435761 % 2**32  # Knuth's multiplicative hash
    return start + (mixed // 2**16) * width // 2**16


@torch.no_grad()
def added_in(out: torch.Tensor, of_plan: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What a method added to what was made of its plan, in some rows, `[B, H, R, D]` in float32 or better.

    Args:
        out: `[B, H, Nq, D]`. of_plan: `[B, H, R, D]`, these rows before it was added. rows: `[R]` int64.
    """
    dtype = torch.promote_types(out.dtype, torch.float32)
    return out.index_select(2, rows).to(dtype) - of_plan.to(dtype)


@torch.no_grad()
def relative_error(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    share: HeadShare = ALL_HEADS,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """How far an output is from dense attention, in some rows: `norm(out - dense) / norm(dense)` over all of them.

    Dense attention of the rows is computed as softmax is defined, in float32 (float64 for inputs of that), a few heads
    at a time: `rows * keys` scores a head, beside which the keys and values in float32 are what takes memory. Where the
    user has allowed TF32, products are in that; it holds bfloat16 and float16 inputs exactly. Not to be called under
    autocast.

    Args:
        out: what a method gave, `[B, H, Nq, D]`. q: `[B, H, Nq, D]`. k, v: `[B, Hkv, Nk, D]`, H a multiple of Hkv.
        rows: `[R]` int64, positions in q.
        share: which of the heads these are, where processes share them; the error is that of all.
        beside: `[B, H, R, D]`, what the method adds to dense attention, too, in these rows, which is no error then;
            nothing when None.

    Returns:
        0-dim, on the device of `q`, over batch, heads and rows: nothing is read on the host.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, keys, channels = k.shape
    group = q.shape[1] // heads
    per_head = batch * keys * (2 * channels + 2 * group * len(rows)) * dtype.itemsize
    step = max(1, CHUNK_BYTES // per_head)
    wrong = whole = torch.zeros((), dtype=dtype, device=q.device)
    for first in range(0, heads, step):
        part, readers = slice(first, first + step), slice(group * first, group * (first + step))
        query, got = (x[:, readers].index_select(2, rows).to(dtype) for x in (q, out))
        weights = (group_product(query, k[:, part].to(dtype).transpose(-1, -2)) * channels**-0.5).softmax(-1)
        dense = group_product(weights, v[:, part].to(dtype))
        dense = dense if beside is None else dense + beside[:, readers]
        wrong, whole = wrong + (got - dense).square().sum(), whole + dense.square().sum()
    wrong, whole = share.sum(torch.stack([wrong, whole]))
    return (wrong / whole.clamp(min=torch.finfo(dtype).tiny)).sqrt()
