"""What the forward kernel does with one tile of keys: a step of the online softmax, from 16 or 32 bits, or from int8.

All steps take the state `(m, total, acc)`: row maxima in base 2, row sums, and the output before it is divided by them,
in column parts (`columns.py`), in which the values are read too.

`bound`, where it is not None, is the second stage of SpargeAttn (arXiv 2502.18137, section 3.4): a tile whose scores
all lie further below the running maximum of their row is left out, whole, once its scores are known. That saves the
softmax of the tile, its values, and its product with them. The paper decides so for each warp; Triton branches for all
warps of a program together, so a tile is left out where no row of the program needs it. The values are loaded behind
the branch: the compiler prefetches only what a product of the loop's own block reads, so that a load before it would
be waited for in every tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import add_products, load_parts
from .walk import load_rows

# Of the fp8 variant (`block_sparse_int8.py`): the power of two that lifts its weights; how many products may be added
# before their sum moves to float32, at most the keys of a tile.
FP8_LIFT = tl.constexpr(8.0)
FP8_ADDED = tl.constexpr(32)
UNREAD_MAXIMUM = tl.constexpr(1e30)  # of rows that no query is in, so that none of them needs a tile
# A row's maximum before its first tile: finite, so that a tile whose scores are all -inf has weights of 0, not of NaN.
NO_MAXIMUM = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _needed(m, highest, bound):
    """Whether a row has a score, the highest being given, that is not further below its running maximum than that.

    A row of NaN needs its tiles, so that NaN comes out. Where some keys do not count, its highest score is -inf.
    """
    if bound is None:
        needed = True
    else:
        below = m - highest
        below = tl.where(below < float("inf"), below, 0.0)
        # Over a row of a matrix: of a vector, Triton 3.7 fails to compile it for compute capability 10.
        needed = tl.min(tl.min(below[None, :], 1), 0) <= bound
    return needed


@triton.jit
def _with_values(state, new_m, p, v, D_PAD: tl.constexpr, ADDED: tl.constexpr):
    """The state after a tile of weights and values; `ADDED` as in `add_products`."""
    m, total, acc = state
    shrink = tl.exp2(m - new_m)
    return new_m, total * shrink + tl.sum(p, 1), add_products(acc, shrink, p, v, D_PAD, ADDED)


@triton.jit
def _described_values(v_desc, v_tail_desc, row, column, inside, MASKED: tl.constexpr):
    if MASKED:
        # What lies behind the tail may be anything, and 0 times NaN is NaN.
        v = tl.where(inside[:, None], v_tail_desc.load([row, column]), 0.0)
    else:
        v = v_desc.load([row, column])
    return (v,)


@triton.jit
def attend_described_tile(
    state, inputs, first, keys, rows, inside, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Keys and values through tensor descriptors; a tail has descriptors of its own size."""
    q, k_desc, v_desc, k_tail_desc, v_tail_desc, k_row, v_row, k_column, v_column, factor, bound = inputs
    k = (k_tail_desc if MASKED else k_desc).load([k_row + first, k_column])
    if bound is None:
        v = _described_values(v_desc, v_tail_desc, v_row + first, v_column, inside, MASKED)
    scores = tl.dot(q, tl.trans(k))
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    # The scale is above 0, so the maximum can be taken before it; it then enters where the maximum is subtracted.
    highest = tl.max(scores, 1) * factor
    if _needed(state[0], highest, bound):
        if bound is not None:
            v = _described_values(v_desc, v_tail_desc, v_row + first, v_column, inside, MASKED)
        new_m = tl.maximum(state[0], highest)
        state = _with_values(state, new_m, tl.exp2(scores * factor - new_m[:, None]), v, D_PAD, None)
    return state


@triton.jit
def attend_tile(state, inputs, first, keys, rows, inside, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """Keys and values row by row; the scale may have any sign."""
    q, k_ptr, v_ptr, k_sn, v_sn, factor, bound = inputs
    d = tl.arange(0, D_PAD)
    k = load_rows(k_ptr, rows, k_sn, inside, d, D, D_PAD, MASKED)
    if bound is None:
        v = load_parts(state[2], v_ptr, rows, v_sn, inside, D, D_PAD, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    # Also where all scores are -inf the new maximum is finite, so that the differences are never inf - inf.
    highest = tl.max(scores, 1)
    if _needed(state[0], highest, bound):
        if bound is not None:
            v = load_parts(state[2], v_ptr, rows, v_sn, inside, D, D_PAD, MASKED)
        new_m = tl.maximum(state[0], highest)
        state = _with_values(state, new_m, tl.exp2(scores - new_m[:, None]), v, D_PAD, None)
    return state


@triton.jit
def attend_int8_tile(
    state, inputs, first, keys, rows, inside, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """k in int8, in permuted order; `factor` holds the scale of each query, and each key has one of its own.

    Where v is fp8, the weights are lifted by 2 ** 8, to use what e4m3 can hold, which is 2 ** -9 to 448.
    """
    q, k_ptr, v_ptr, k_sn, v_sn, factor, k_scale_ptr, bound = inputs
    d = tl.arange(0, D_PAD)
    k = load_rows(k_ptr, keys, k_sn, inside, d, D, D_PAD, MASKED)
    k_scale = tl.load(k_scale_ptr + keys, mask=inside, other=0.0)
    # The scales of queries are above 0, so the maximum can be taken before them, and then they cost no step of
    # their own: they are multiplied in where the maximum is subtracted, by one instruction.
    scores = tl.dot(q, tl.trans(k)).to(tl.float32) * k_scale[None, :]
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    highest = tl.max(scores, 1) * factor
    if v_ptr.dtype.element_ty == tl.float8e4nv:
        v = load_parts(state[2], v_ptr, keys, v_sn, inside, D, D_PAD, MASKED)
        new_m = tl.maximum(state[0], highest)
        p = tl.exp2(tl.fma(scores, factor[:, None], -(new_m - FP8_LIFT)[:, None]))
        # The tensor cores of compute capability 9 add fp8 products in few bits: after so many the sum moves to float32.
        state = _with_values(state, new_m, p, v, D_PAD, FP8_ADDED)
    else:
        if bound is None:
            v = load_parts(state[2], v_ptr, rows, v_sn, inside, D, D_PAD, MASKED)
        if _needed(state[0], highest, bound):
            if bound is not None:
                v = load_parts(state[2], v_ptr, rows, v_sn, inside, D, D_PAD, MASKED)
            new_m = tl.maximum(state[0], highest)
            p = tl.exp2(tl.fma(scores, factor[:, None], -new_m[:, None]))
            state = _with_values(state, new_m, p, v, D_PAD, None)
    return state


@triton.jit
def attend_int8_block(
    state, inputs, first, keys, rows, inside, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """k in int8, in permuted order, with one scale for all keys of the tile, which begins at a multiple of its size.

    The scores stay whole numbers until both scales are multiplied in, where the maximum is subtracted.
    """
    q, k_ptr, v_ptr, k_sn, v_sn, factor, k_scale_ptr, bound, BLOCK_N = inputs
    d = tl.arange(0, D_PAD)
    k = load_rows(k_ptr, keys, k_sn, inside, d, D, D_PAD, MASKED)
    if bound is None:
        v = load_parts(state[2], v_ptr, rows, v_sn, inside, D, D_PAD, MASKED)
    factor *= tl.load(k_scale_ptr + first // BLOCK_N)
    scores = tl.dot(q, tl.trans(k)).to(tl.float32)
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    highest = tl.max(scores, 1) * factor
    if _needed(state[0], highest, bound):
        if bound is not None:
            v = load_parts(state[2], v_ptr, rows, v_sn, inside, D, D_PAD, MASKED)
        new_m = tl.maximum(state[0], highest)
        p = tl.exp2(tl.fma(scores, factor[:, None], -new_m[:, None]))
        state = _with_values(state, new_m, p, v, D_PAD, None)
    return state
