"""q and k to int8 and v to fp8, each in one pass that also puts the tokens in the order of a plan.

Every token of q has a scale of its own, which lies in permuted order beside the int8 values, and so has every token of
k where runs of keys start anywhere: one scale a tile (both are in SageAttention, arXiv 2410.02367, section 4) would
have to belong to fixed blocks of positions, and the attention kernel would load one scale a key all the same. It is
also more exact: over 1024 normally distributed tokens the output is off by .9 % instead of 1.3 % with blocks of 64, and
where the lengths of the tokens vary as exp(.6 x), by 2.1 instead of 5.1 %. Where all runs start at multiples of the
tile, k has one scale for each tile: the kernel then multiplies no score by it, 28 instructions fewer in a tile of 64.

Smoothing (ibid.): channels of K are often far from 0 for all tokens alike, which would use up the range of
int8. Taking their mean over all keys of the head from each key changes every score of a query q by the same q . mean,
which softmax does not see, but the log-sum-exp does. The pass over q writes this number, for the kernel to add.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..groups import repeat_heads
from .launch import FUSED, LOG2E, heads_in_order, on_device, order_args, padded, rows_contiguous
from .walk import load_rows, store_rows, token_rows

FP8_LARGEST = 448.0  # of float8_e4m3fn
ROWS = 64  # tokens a program


@triton.jit
def _block_of_rows(order_ptr, order_sb, order_sh, heads, n, ROWS: tl.constexpr, ORDERED: tl.constexpr):
    """The rows of this program: `(b, h, positions, inside, tokens)`."""
    blocks = tl.cdiv(n, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b = head // heads
    h = head % heads
    positions = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside = positions < n
    if ORDERED:
        order_ptr += b * order_sb + h * order_sh
    return b, h, positions, inside, token_rows(order_ptr, positions, inside, ORDERED, True)


@triton.jit
def _int8_kernel(
    x_ptr, mean_ptr, int8_ptr, scale_ptr, shift_ptr, x_sb, x_sh, x_sn, int8_sb, int8_sh, int8_sn,
    order_ptr, order_sb, order_sh, heads, group, n, factor,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, SMOOTHED: tl.constexpr, ORDERED: tl.constexpr,
    BLOCKED: tl.constexpr,
):  # fmt: skip
    """`BLOCKED`: one scale for all rows of the program."""
    b, h, positions, inside, rows = _block_of_rows(order_ptr, order_sb, order_sh, heads, n, ROWS, ORDERED)
    head = b * heads + h
    d = tl.arange(0, D_PAD)
    x = load_rows(x_ptr + b * x_sb + h // group * x_sh, rows, x_sn, inside, d, D, D_PAD, True).to(tl.float32) * factor
    mean = tl.load(mean_ptr + head * D + d, mask=d < D, other=0.0)[None, :]
    if SMOOTHED:
        x = tl.where(inside[:, None], x - mean, 0.0)
    else:
        # The queries carry a factor of log2(e), the log-sum-exp is natural.
        tl.store(shift_ptr + head * n + positions, tl.sum(x * mean, 1) * 0.6931471805599453, mask=inside)
    # A token of zeros needs a scale above 0, too. A maximum may pass over NaN but a sum does not: with it the scale,
    # and so every score of the token, is NaN where an input is NaN or infinite.
    largest = tl.maximum(tl.max(tl.abs(x), 1), 1e-30) + tl.sum(x * 0.0, 1)
    if BLOCKED:
        largest = tl.zeros([ROWS], tl.float32) + (tl.max(largest, 0) + tl.sum(largest * 0.0, 0))
        blocks = tl.cdiv(n, ROWS)
        tl.store(scale_ptr + head * blocks + tl.program_id(0) % blocks + tl.arange(0, ROWS), largest / 127.0,
                 mask=tl.arange(0, ROWS) == 0)  # fmt: skip
    else:
        tl.store(scale_ptr + head * n + positions, largest / 127.0, mask=inside)
    x = tl.floor(x * (127.0 / largest)[:, None] + 0.5)
    store_rows(int8_ptr + b * int8_sb + h * int8_sh, positions, int8_sn, inside, d, x, D)


@triton.jit
def _fp8_kernel(
    x_ptr, inverse_ptr, fp8_ptr, x_sb, x_sh, x_sn, fp8_sb, fp8_sh, fp8_sn,
    order_ptr, order_sb, order_sh, heads, group, n,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    b, h, positions, inside, rows = _block_of_rows(order_ptr, order_sb, order_sh, heads, n, ROWS, ORDERED)
    d = tl.arange(0, D_PAD)
    x = load_rows(x_ptr + b * x_sb + h // group * x_sh, rows, x_sn, inside, d, D, D_PAD, True).to(tl.float32)
    inverse = tl.load(inverse_ptr + (b * heads + h) * D + d, mask=d < D, other=0.0)[None, :]
    store_rows(fp8_ptr + b * fp8_sb + h * fp8_sh, positions, fp8_sn, inside, d, x * inverse, D)


class QuantizedQK(NamedTuple):
    """q and k as int8, in permuted order: `q * q_scale` times `k * k_scale` is the score in base 2, less the shift.

    Args:
        q: `[B, H, n_q, D]` int8. k: `[B, Hk, n_kv, D]` int8, Hk the larger of the heads of k and of `kv_order`. Both
            with `stride(-1) == 1`.
        q_scale: `[B, H, n_q]` float32, above 0, in permuted order; holds the scale of the scores and log2(e).
        k_scale: `[B, Hk, n_kv]` float32, above 0, in permuted order.
        lse_shift: `[B, H, n_q]` float32, in permuted order: what to add to the log-sum-exp (natural), because the mean
            over all keys was taken from each key.
    """

    q: torch.Tensor
    k: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    lse_shift: torch.Tensor


def quantize_qk(
    q: torch.Tensor,
    k: torch.Tensor,
    q_order: torch.Tensor | None,
    kv_order: torch.Tensor | None,
    scale: float,
    k_block: int = 0,
) -> QuantizedQK:
    """Permute and quantise.

    Args:
        q: `[B, H, n_q, D]`, k: `[B, Hkv, n_kv, D]`; float16, bfloat16 or float32; any strides (copied first only where
            the channels of a token do not lie side by side).
        q_order: `[1|B, 1|H, n_q]` int64 or None. kv_order: `[1|B, 1|H, n_kv]` int64 or None.
        scale: multiplies the scores.
        k_block: keys that share a scale, a power of two; each has its own when 0.
    """
    mean = k.mean(2, dtype=torch.float32).contiguous()
    shift = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    q, q_scale = _to_int8(q, q_order, mean, scale * LOG2E, shift)
    k, k_scale = _to_int8(k, kv_order, mean, 1.0, None, k_block)
    return QuantizedQK(q, k, q_scale, k_scale, shift)


def _to_int8(
    x: torch.Tensor,
    order: torch.Tensor | None,
    mean: torch.Tensor,
    factor: float,
    shift: torch.Tensor | None,
    block: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 and scales of `factor * x`; of `x - mean` where there is no shift to write."""
    x = rows_contiguous(x)
    batch, own, n, dim = x.shape
    heads = heads_in_order(x, order)
    mean = repeat_heads(mean, heads).contiguous()
    quantized = _empty(x, heads, torch.int8)
    rows = block or ROWS
    scale = torch.empty(batch, heads, triton.cdiv(n, block or 1), dtype=torch.float32, device=x.device)
    with on_device(x):
        _int8_kernel[(batch * heads * triton.cdiv(n, rows),)](
            x, mean, quantized, scale, shift, *x.stride()[:3], *quantized.stride()[:3], *order_args(order, heads),
            heads, heads // own, n, factor,
            D=dim, D_PAD=padded(dim), ROWS=rows, SMOOTHED=shift is None, ORDERED=order is not None, BLOCKED=block > 0,
            **FUSED,
        )  # fmt: skip
    return quantized, scale


def quantize_v(v: torch.Tensor, kv_order: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Permute `v [B, H, N, D]` and quantise it with one scale for each channel of each head.

    Returns:
        `[B, Hv, N, D]` float8_e4m3fn in permuted order, and the scales `[B, Hv, D]` float32; Hv is the larger of the
        heads of v and of the order.
    """
    v = rows_contiguous(v)
    batch, own, n, dim = v.shape
    heads = heads_in_order(v, kv_order)
    largest = torch.linalg.vector_norm(v, torch.inf, 2).float().clamp(min=1e-30)
    largest = repeat_heads(largest, heads).contiguous()
    quantized = _empty(v, heads, torch.float8_e4m3fn)
    with on_device(v):
        _fp8_kernel[(batch * heads * triton.cdiv(n, ROWS),)](
            v, FP8_LARGEST / largest, quantized, *v.stride()[:3], *quantized.stride()[:3],
            *order_args(kv_order, heads), heads, heads // own, n,
            D=dim, D_PAD=padded(dim), ROWS=ROWS, ORDERED=kv_order is not None, **FUSED,
        )  # fmt: skip
    return quantized, largest / FP8_LARGEST


def _empty(x: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for so many heads of `x [B, H, N, D]` in a type of one byte; rows start at multiples of 16 bytes, for
    wide loads."""
    batch, _, n, dim = x.shape
    return torch.empty(batch, heads, n, triton.cdiv(dim, 16) * 16, dtype=dtype, device=x.device)[..., :dim]
