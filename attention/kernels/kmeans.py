"""One iteration of k-means as Triton kernels: the nearest centroid of each token, and the mean token of each centroid.

Tokens are read where they lie, in their own dtype and strides: neither a float32 copy of them nor the `[N, C]` matrix
of distances is ever in memory. Sums are taken in a fixed order, without atomics, so a run can be repeated bit for bit.
No value is read on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..clustering.labels import label_dtype, sort_labels
from .launch import FUSED, Tiles, on_device, padded, rows_contiguous
from .runs import cut_clusters
from .walk import load_rows

# Of the assignment: tokens a program, centroids at a time, warps and stages; of 16-bit tokens measured on an H200.
HALF = Tiles(128, 64, 8, 3)
SINGLE = Tiles(64, 64, 4, 2)
HALF_WIDE, SINGLE_WIDE = Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 1)  # of a head_dim above 128
PIECE = 256  # members that one program adds up: a cluster of half the sequence is the work of many programs
ADDED = 32  # of them at a time
COUNTED = 128  # clusters whose sizes one program finds


def assign(x: torch.Tensor, mean: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """The nearest centroid of each token, `[B, H, N]` int16 or int64; of equally near ones the first.

    16-bit tokens are compared with the centroids rounded to their dtype, relative to the mean: a product of 16-bit
    numbers is exact in float32, so each token still gets the nearest of these. That is three times as fast as TF32, and
    k-means is as good with centroids moved by a rounding.

    Args:
        x: `[B, H, N, D]`, any strides.
        mean: `[B, H, 1, D]` float32, of the tokens.
        centers: `[B, H, C, D]`.

    Returns:
        In 16 bits where the clusters allow, which sort faster.
    """
    x, mean = rows_contiguous(x), mean.contiguous()
    half = x.element_size() == 2
    tiles = (HALF if half else SINGLE) if x.shape[-1] <= 128 else (HALF_WIDE if half else SINGLE_WIDE)
    batch, heads, tokens, dim = x.shape
    clusters = centers.shape[2]
    rounded = torch.empty(centers.shape, dtype=x.dtype, device=x.device)
    offset = torch.empty(centers.shape[:3], dtype=torch.float32, device=x.device)
    labels = torch.empty(batch, heads, tokens, dtype=label_dtype(clusters), device=x.device)
    with on_device(x):
        _center_kernel[(clusters, batch * heads)](
            centers.contiguous(), mean, rounded, offset, clusters,
            D=dim, D_PAD=padded(dim), HALF=half, **FUSED, num_warps=1,
        )  # fmt: skip
        _assign_kernel[(triton.cdiv(tokens, tiles.block_m), batch * heads)](
            x, mean, rounded, offset, labels, *x.stride()[:3], heads, tokens, clusters,
            D=dim, D_PAD=padded(dim), BLOCK_N=tiles.block_m, BLOCK_C=min(tiles.block_n, padded(clusters)), HALF=half,
            **FUSED, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return labels


def in_clusters(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens sorted by cluster, `[B, H, N]` int64, and the size of each cluster, `[B, H, C]` int64."""
    ordered, order = sort_labels(labels, clusters)
    sizes = torch.empty(*labels.shape[:2], clusters, dtype=torch.int64, device=labels.device)
    with on_device(labels):
        _sizes_kernel[(triton.cdiv(clusters, COUNTED), sizes[..., 0].numel())](
            ordered, sizes, labels.shape[2], clusters, labels.shape[2].bit_length(), BLOCK=COUNTED, **FUSED, num_warps=1
        )
    return order, sizes


def means_of(
    x: torch.Tensor,
    mean: torch.Tensor,
    order: torch.Tensor,
    sizes: torch.Tensor,
    centers: torch.Tensor,
) -> torch.Tensor:
    """Mean of the tokens of each cluster, `[B, H, C, D]` float32. Sums are taken relative to `mean`.

    Args:
        x: `[B, H, N, D]`, any strides. mean: `[B, H, 1, D]` float32.
        order, sizes: as `in_clusters` gives them.
        centers: `[B, H, C, D]`, the mean of a cluster without tokens.
    """
    x = rows_contiguous(x)
    batch, heads, tokens, dim = x.shape
    clusters = sizes.shape[-1]
    start, length, first = cut_clusters(sizes, tokens, PIECE)
    pieces = start.shape[-1]
    sums = torch.empty(batch, heads, pieces, dim, dtype=torch.float32, device=x.device)
    out = torch.empty(batch, heads, clusters, dim, dtype=torch.float32, device=x.device)
    mean, centers, sizes = (t.contiguous() for t in (mean, centers, sizes))
    with on_device(x):
        _sum_kernel[(pieces, batch * heads)](
            x, mean, order, start, length, sums, *x.stride()[:3], heads, tokens, pieces,
            D=dim, D_PAD=padded(dim), BLOCK=ADDED, **FUSED, num_warps=4,
        )  # fmt: skip
        _mean_kernel[(clusters, batch * heads)](
            sums, first, sizes, mean, centers, out, clusters, pieces,
            D=dim, D_PAD=padded(dim), MOST=PIECE, **FUSED, num_warps=1,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["clusters"])
def _center_kernel(
    center_ptr, mean_ptr, rounded_ptr, offset_ptr, clusters, D: tl.constexpr, D_PAD: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """A centroid relative to the mean, as it is compared with tokens, and what is taken from its products with them.

    The nearest has the largest `(x - mean) . c - |c| ** 2 / 2`. Of the first term, 16-bit tokens leave out the mean.
    """
    head = tl.program_id(1).to(tl.int64)
    at = head * clusters + tl.program_id(0)
    d = tl.arange(0, D_PAD)
    mean = tl.load(mean_ptr + head * D + d, mask=d < D, other=0.0)
    center = tl.load(center_ptr + at * D + d, mask=d < D, other=0.0).to(tl.float32) - mean
    rounded = center.to(rounded_ptr.dtype.element_ty)
    tl.store(rounded_ptr + at * D + d, rounded, mask=d < D)
    center = rounded.to(tl.float32)
    offset = tl.sum(center * center, 0) / 2
    if HALF:
        offset += tl.sum(center * mean, 0)
    tl.store(offset_ptr + at, offset)


@triton.jit
def _assign_kernel(
    x_ptr, mean_ptr, center_ptr, offset_ptr, label_ptr, x_sb, x_sh, x_sn, heads, tokens, clusters,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < tokens
    d = tl.arange(0, D_PAD)
    x_ptr += (head // heads) * x_sb + (head % heads) * x_sh
    x = load_rows(x_ptr, rows, x_sn, inside, d, D, D_PAD, True)
    if not HALF:
        x -= tl.load(mean_ptr + head * D + d, mask=d < D, other=0.0)[None, :]
    center_ptr += head * clusters * D
    offset_ptr += head * clusters
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, clusters, BLOCK_C):
        ids = start + tl.arange(0, BLOCK_C)
        real = ids < clusters
        c = load_rows(center_ptr, ids, D, real, d, D, D_PAD, True)
        offset = tl.load(offset_ptr + ids, mask=real, other=float("inf"))
        score = tl.dot(x, tl.trans(c), input_precision="ieee") - offset[None, :]
        top, place = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        better = top > best
        best = tl.where(better, top, best)
        label = tl.where(better, start + place, label)
    tl.store(label_ptr + head * tokens + rows, label.to(label_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "clusters", "steps"])
def _sizes_kernel(ordered_ptr, size_ptr, tokens, clusters, steps, BLOCK: tl.constexpr):
    """How many of the sorted labels are each cluster's: where they end, less where those of the one before do."""
    row = tl.program_id(1).to(tl.int64)
    cluster = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ordered_ptr += row * tokens
    below = tl.zeros([BLOCK], tl.int32)  # labels that are smaller
    upto = tl.zeros([BLOCK], tl.int32)  # smaller or the same
    for step in range(steps):
        jump = 1 << (steps - 1 - step)
        at = below + jump
        label = tl.load(ordered_ptr + at - 1, mask=at <= tokens, other=0)
        below = tl.where((at <= tokens) & (label < cluster), at, below)
        at = upto + jump
        label = tl.load(ordered_ptr + at - 1, mask=at <= tokens, other=0)
        upto = tl.where((at <= tokens) & (label <= cluster), at, upto)
    tl.store(size_ptr + row * clusters + cluster, (upto - below).to(tl.int64), mask=cluster < clusters)


@triton.jit
def _sum_kernel(
    x_ptr, mean_ptr, order_ptr, start_ptr, length_ptr, sum_ptr, x_sb, x_sh, x_sn, heads, tokens, pieces,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the tokens of one piece of a cluster."""
    head = tl.program_id(1).to(tl.int64)
    at = head * pieces + tl.program_id(0)
    start = tl.load(start_ptr + at)
    length = tl.load(length_ptr + at)
    d = tl.arange(0, D_PAD)
    mean = tl.load(mean_ptr + head * D + d, mask=d < D, other=0.0)[None, :]
    x_ptr += (head // heads) * x_sb + (head % heads) * x_sh
    total = tl.zeros([D_PAD], tl.float32)
    for offset in range(0, length, BLOCK):
        members = offset + tl.arange(0, BLOCK)
        inside = members < length
        rows = tl.load(order_ptr + head * tokens + start + members, mask=inside, other=0)
        x = load_rows(x_ptr, rows, x_sn, inside, d, D, D_PAD, True).to(tl.float32)
        total += tl.sum(tl.where(inside[:, None], x - mean, 0.0), 0)
    tl.store(sum_ptr + at * D + d, total, mask=d < D)


@triton.jit
def _mean_kernel(
    sum_ptr, first_ptr, size_ptr, mean_ptr, center_ptr, out_ptr, clusters, pieces,
    D: tl.constexpr, D_PAD: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """The center of one cluster, from the sums of its pieces."""
    head = tl.program_id(1).to(tl.int64)
    at = head * clusters + tl.program_id(0)
    first = tl.load(first_ptr + at)
    size = tl.load(size_ptr + at).to(tl.int32)
    d = tl.arange(0, D_PAD)
    total = tl.zeros([D_PAD], tl.float32)
    for piece in range(tl.cdiv(size, MOST)):
        place = head * pieces + first + piece
        total += tl.load(sum_ptr + place * D + d, mask=d < D, other=0.0)
    old = tl.load(center_ptr + at * D + d, mask=d < D, other=0.0).to(tl.float32)
    share = 1.0 / tl.maximum(size, 1).to(tl.float32)
    mean = tl.load(mean_ptr + head * D + d, mask=d < D, other=0.0)
    tl.store(out_ptr + at * D + d, tl.where(size > 0, total * share + mean, old), mask=d < D)
