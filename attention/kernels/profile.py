"""Attention of a few rows under several masks at once, in one pass over keys and values: how SVG profiles its heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FUSED, LOG2E, on_device, padded, rows_contiguous
from .walk import load_rows

SPLIT = 4096  # keys a program: a few rows of one head alone would leave most of the GPU idle
KEYS = 64  # at a time


def attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of R rows over all keys, and over those of each of two masks.

    Args:
        q: `[B, H, R, D]`, 64 rows at most, 32 of float32. k, v: `[B, Hkv, N, D]`, any strides, H a multiple of Hkv.
        masks: `[2, R, N]` bool.
        scale: multiplies the scores.

    Returns:
        `full [B, H, R, D]` and `masked [B, H, 2, R, D]` float32; 0 where a mask has no key.
    """
    k, v = rows_contiguous(k), rows_contiguous(v)
    (batch, heads, rows, dim), tokens = q.shape, k.shape[2]
    splits = triton.cdiv(tokens, SPLIT)
    top = torch.empty(batch, heads, splits, rows, dtype=torch.float32, device=q.device)
    total = torch.empty(batch, heads, splits, 3, rows, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, splits, 3, rows, dim, dtype=torch.float32, device=q.device)
    rows_width, d_pad = padded(rows), padded(dim)
    with on_device(k):
        _rows_kernel[(splits, batch * heads)](
            q.to(k.dtype).contiguous(), k, v, masks.contiguous().view(torch.int8), top, total, out,
            *k.stride()[:3], *v.stride()[:3], heads, heads // k.shape[1], rows, tokens, splits, scale * LOG2E,
            D=dim, D_PAD=d_pad, ROWS=rows_width, SPLIT=SPLIT, KEYS=KEYS if k.element_size() == 2 else 16,
            **FUSED, num_warps=8, num_stages=stages_of(rows_width, d_pad),
        )  # fmt: skip
    weight = (top - top.amax(2, keepdim=True)).exp2().unsqueeze(3)
    total, out = (total * weight).sum(2), (out * weight.unsqueeze(-1)).sum(2)
    out = out / total.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return out[:, :, 0], out[:, :, 1:]


def stages_of(rows: int, d_pad: int) -> int:
    """Of the load pipeline; the largest tiles leave room for one in the 99 KiB that some GPUs have."""
    return 2 if rows * d_pad <= 64 * 128 else 1


@triton.jit(do_not_specialize=["rows", "tokens", "splits"])
def _rows_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, top_ptr, total_ptr, out_ptr, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
    heads, group, rows, tokens, splits, qk_scale,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    k_ptr += (head // heads) * k_sb + (head % heads) // group * k_sh
    v_ptr += (head // heads) * v_sb + (head % heads) // group * v_sh
    row = tl.arange(0, ROWS)
    real = row < rows
    d = tl.arange(0, D_PAD)
    q = load_rows(q_ptr + head * rows * D, row, D, real, d, D, D_PAD, True)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    all_total = tl.zeros([ROWS], tl.float32)
    one_total = tl.zeros([ROWS], tl.float32)
    two_total = tl.zeros([ROWS], tl.float32)
    all_out = tl.zeros([ROWS, D_PAD], tl.float32)
    one_out = tl.zeros([ROWS, D_PAD], tl.float32)
    two_out = tl.zeros([ROWS, D_PAD], tl.float32)
    first = tl.program_id(0) * SPLIT
    for start in range(first, tl.minimum(first + SPLIT, tokens), KEYS):
        keys = start + tl.arange(0, KEYS)
        inside = keys < tokens
        k = load_rows(k_ptr, keys, k_sn, inside, d, D, D_PAD, True)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        p = tl.exp2(scores - new_m[:, None])
        shrink = tl.exp2(m - new_m)
        at = mask_ptr + row.to(tl.int64)[:, None] * tokens + keys[None, :]
        seen = real[:, None] & inside[None, :]
        one = tl.where(tl.load(at, mask=seen, other=0) != 0, p, 0.0)
        two = tl.where(tl.load(at + rows.to(tl.int64) * tokens, mask=seen, other=0) != 0, p, 0.0)
        v = load_rows(v_ptr, keys, v_sn, inside, d, D, D_PAD, True)
        all_total = all_total * shrink + tl.sum(p, 1)
        one_total = one_total * shrink + tl.sum(one, 1)
        two_total = two_total * shrink + tl.sum(two, 1)
        all_out = tl.dot(p.to(v.dtype), v, all_out * shrink[:, None], input_precision="ieee")
        one_out = tl.dot(one.to(v.dtype), v, one_out * shrink[:, None], input_precision="ieee")
        two_out = tl.dot(two.to(v.dtype), v, two_out * shrink[:, None], input_precision="ieee")
        m = new_m
    place = head * splits + tl.program_id(0)
    tl.store(top_ptr + place * rows + row, m, mask=real)
    total_ptr += place * 3 * rows
    tl.store(total_ptr + row, all_total, mask=real)
    tl.store(total_ptr + rows + row, one_total, mask=real)
    tl.store(total_ptr + 2 * rows + row, two_total, mask=real)
    at = out_ptr + (place * 3 * rows + row[:, None]) * D + d[None, :]
    written = real[:, None] & (d < D)[None, :]
    tl.store(at, all_out, mask=written)
    tl.store(at + rows * D, one_out, mask=written)
    tl.store(at + 2 * rows * D, two_out, mask=written)
