"""Tokens in another order, in one pass over memory: `plan.permute` for what the kernels read, from any strides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FUSED, heads_in_order, on_device, order_args, padded, rows_contiguous
from .walk import load_rows, store_rows, token_rows

ROWS = 64  # tokens a program
ENTRIES = 1024  # of an order, a program


def permute_rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Tokens of `x [B, H, N, D]` in `order [1|B, 1|H, N]`, contiguous; torch needs two copies, one to flatten x.

    An order of more heads repeats x for them, as `plan.permute` does.
    """
    x = rows_contiguous(x)
    batch, own, tokens, dim = x.shape
    heads = heads_in_order(x, order)
    out = torch.empty(batch, heads, tokens, dim, dtype=x.dtype, device=x.device)
    with on_device(x):
        _permute_kernel[(triton.cdiv(tokens, ROWS), batch * heads)](
            x, out, *x.stride()[:3], *order_args(order, heads), heads, heads // own, tokens,
            D=dim, D_PAD=padded(dim), ROWS=ROWS, **FUSED,
        )  # fmt: skip
    return out


def keys_in_order(
    k: torch.Tensor, v: torch.Tensor, kv_order: torch.Tensor | None, gather_kv: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """k and v as the kernels read them, and the order they still have to be read through, or None."""
    if kv_order is not None and not gather_kv:
        k, v, kv_order = permute_rows(k, kv_order), permute_rows(v, kv_order), None
    return rows_contiguous(k), rows_contiguous(v), kv_order


def text_last(order: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """An order of a video `[B, H, n]` int64 as one of the sequence with text before and after it, the text last."""
    order = order.contiguous()
    video = order.shape[-1]
    out = torch.empty(*order.shape[:2], video + before + after, dtype=torch.int64, device=order.device)
    with on_device(order):
        _text_last_kernel[(triton.cdiv(out.shape[-1], ENTRIES), out[..., 0].numel())](
            order, out, video, before, after, BLOCK=ENTRIES, **FUSED, num_warps=4
        )
    return out


@triton.jit(do_not_specialize=["video", "before", "after"])
def _text_last_kernel(order_ptr, out_ptr, video, before, after, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < video
    tokens = tl.load(order_ptr + row * video + at, mask=inside, other=0) + before
    # Behind the video the text in its own order: what stands before the video, then what stands after it.
    text = at - video + tl.where(at - video < before, 0, video)
    out = tl.where(inside, tokens, text.to(tl.int64))
    tl.store(out_ptr + row * (video + before + after) + at, out, mask=at < video + before + after)


@triton.jit(do_not_specialize=["tokens"])
def _permute_kernel(
    x_ptr, out_ptr, x_sb, x_sh, x_sn, order_ptr, order_sb, order_sh, heads, group, tokens,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    b = head // heads
    h = head % heads
    positions = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = positions < tokens
    d = tl.arange(0, D_PAD)
    rows = token_rows(order_ptr + b * order_sb + h * order_sh, positions, inside, True, True)
    tile = load_rows(x_ptr + b * x_sb + h // group * x_sh, rows, x_sn, inside, d, D, D_PAD, True)
    store_rows(out_ptr + head * tokens * D, positions, D, inside, d, tile, D)
