"""What tokens spread over each cluster have beyond its mean: the input of its covariance (`probe.score_variance`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FUSED, on_device, padded, rows_contiguous
from .walk import load_rows

BLOCK = 256  # sizes at a time


def deviations(
    x: torch.Tensor,
    order: torch.Tensor,
    sizes: torch.Tensor,
    means: torch.Tensor | None,
    sample: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`spread.deviations` in one pass, without a table of rows or a copy of the tokens.

    Args:
        x: `[B, H, N, D]`, any strides. order: `[B, H, N]` int64. sizes: `[B, H, C]` int64.
        means: `[B, H, C, D]`; that of the sample when None.
        sample: tokens of a cluster, a power of two.
        dtype: of the result.

    Returns:
        `[B, H, C, sample, D]`.
    """
    x = rows_contiguous(x)
    (batch, heads, tokens, dim), clusters = x.shape, sizes.shape[-1]
    out = torch.empty(batch, heads, clusters, sample, dim, dtype=dtype, device=x.device)
    with on_device(x):
        _deviations_kernel[(clusters, batch * heads)](
            x, order.contiguous(), sizes.contiguous(), None if means is None else means.contiguous(), out,
            *x.stride()[:3], heads, tokens, clusters,
            D=dim, D_PAD=padded(dim), SAMPLE=sample, BLOCK=BLOCK, MEANS=means is not None, **FUSED, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "clusters"])
def _deviations_kernel(
    x_ptr, order_ptr, size_ptr, mean_ptr, out_ptr, x_sb, x_sh, x_sn, heads, tokens, clusters,
    D: tl.constexpr, D_PAD: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
    MEANS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    cluster = tl.program_id(0)
    start = 0
    for first in range(0, cluster, BLOCK):
        at = first + tl.arange(0, BLOCK)
        start += tl.sum(tl.load(size_ptr + head * clusters + at, mask=at < cluster, other=0).to(tl.int32), 0)
    size = tl.load(size_ptr + head * clusters + cluster).to(tl.int32)
    count = tl.minimum(size, SAMPLE)
    place = tl.arange(0, SAMPLE)
    inside = place < count
    rows = start + place * size // tl.maximum(count, 1)
    token = tl.load(order_ptr + head * tokens + rows, mask=inside, other=0)
    d = tl.arange(0, D_PAD)
    x_ptr += (head // heads) * x_sb + (head % heads) * x_sh
    x = load_rows(x_ptr, token, x_sn, inside, d, D, D_PAD, True).to(tl.float32)
    at = head * clusters + cluster
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    if MEANS:
        x -= tl.load(mean_ptr + at * D + d, mask=d < D, other=0.0)[None, :]
    else:
        x -= (tl.sum(tl.where(inside[:, None], x, 0.0), 0) * share)[None, :]
    # The weight of the mean is that of the sample, not of n - 1: the centre is that of the whole cluster, mostly.
    x = tl.where(inside[:, None], x * tl.sqrt(share), 0.0)
    out = out_ptr + (at * SAMPLE + place)[:, None] * D + d[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=(d < D)[None, :])
