"""Values and outputs as a tuple of column parts, for tiles of fewer queries than a head has dimensions.

Where products are of 16 x 8 x 16 (compute capability 8 and 12), the compiler deals the columns of a product to several
warps once it has fewer rows than columns. The weights of the softmax then go to the other warps through shared memory
in every tile of keys, which makes half as many instructions again. In parts no wider than the tile has queries, each
warp keeps its rows. Behind a branch (a second stage) it deals them out at any width, and least so in narrow parts.
Products of a whole warp group (compute capability 9 and 10) have no need of it: one part.

For tiles of 64 queries and a head_dim of 128 on compute capability 8.9: 792 instructions for 64 keys, 1,166 whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Tiles
from .walk import load_rows, store_rows

WARP_GROUPS = (9, 10)  # major compute capabilities
BRANCHED = 32  # columns


def part_width(major: int, d_pad: int, tiles: Tiles, itemsize: int, branched: bool = False) -> int:
    """The columns of a part of `d_pad` columns, for a compute capability and for values of so many bytes.

    Args:
        branched: the product with the values is behind a branch.

    Tiles with less than 16 queries a warp stay whole: in parts, warps would repeat one another's work instead of
    sharing it. So do products of float32, for which there are no tensor cores.
    """
    whole = major in WARP_GROUPS or itemsize == 4 or tiles.block_m < 16 * tiles.num_warps
    return d_pad if whole else min(d_pad, tiles.block_m, BRANCHED if branched else d_pad)


@triton.jit
def zero_parts(ROWS: tl.constexpr, D_PAD: tl.constexpr, WIDTH: tl.constexpr):
    """An accumulator `[ROWS, D_PAD]` in parts of `WIDTH` columns."""
    parts = ()
    for _ in tl.static_range(D_PAD // WIDTH):
        parts = parts + (tl.zeros([ROWS, WIDTH], tl.float32),)  # type: ignore[assignment]
    return parts


@triton.jit
def load_parts(like, ptr, rows, stride, inside, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """`load_rows` in parts as wide as those of `like`."""
    WIDTH: tl.constexpr = like[0].shape[1]
    parts = ()
    for i in tl.static_range(D_PAD // WIDTH):
        d = i * WIDTH + tl.arange(0, WIDTH)
        part = load_rows(ptr, rows, stride, inside, d, D, D_PAD, MASKED)
        parts = parts + (part,)  # type: ignore[assignment]
    return parts


@triton.jit
def add_products(acc, shrink, p, v, D_PAD: tl.constexpr, ADDED: tl.constexpr):
    """`acc * shrink + p @ v`; at most `ADDED` products are added in the bits of the tensor cores, where not None."""
    WIDTH: tl.constexpr = acc[0].shape[1]
    parts = ()
    for i in tl.static_range(D_PAD // WIDTH):
        moved = acc[i] * shrink[:, None]
        if ADDED is None:
            part = tl.dot(p.to(v[i].dtype), v[i], moved, input_precision="ieee")
        else:
            part = tl.dot(p.to(v[i].dtype), v[i], moved, max_num_imprecise_acc=ADDED)
        parts = parts + (part,)  # type: ignore[assignment]
    return parts


@triton.jit
def store_parts(ptr, rows, stride, inside, acc, total, scale_ptr, D: tl.constexpr, D_PAD: tl.constexpr):
    """Write `acc / total`, with a factor for each column where `scale_ptr` is not None."""
    WIDTH: tl.constexpr = acc[0].shape[1]
    for i in tl.static_range(D_PAD // WIDTH):
        d = i * WIDTH + tl.arange(0, WIDTH)
        part = acc[i] / total[:, None]
        if scale_ptr is not None:
            part *= tl.load(scale_ptr + d, mask=d < D, other=0.0)[None, :]
        store_rows(ptr, rows, stride, inside, d, part, D)
