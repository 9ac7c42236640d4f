"""What stands for skipped clusters (`attention/skipped.py`), in the kernels: a second, short walk, one row a cluster.

A stand-in is one more key of a tile's softmax, with a number that is added to its score: the log of the mass that it
stands for. Read in the same program as the tile's own keys, it costs `clusters / n_kv` of a dense call and no memory
but its tables, where a second result to merge would cost several passes over all outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..plan import BlockPlan
from .columns import add_products, load_parts
from .launch import rows_contiguous
from .walk import load_rows


class StandIns(NamedTuple):
    """The tables of a plan as the kernels read them.

    Args:
        key, value: `[1|B, 1|H, 1|T, C, D]` in the dtype of the queries.
        bias: `[1|B, 1|H, T, C]` float32, added to the scaled score; -inf for a cluster that is read or empty.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor


def stand_ins_of(plan: BlockPlan, dtype: torch.dtype) -> StandIns:
    """The stand-ins of a plan that has some; no host sync."""
    tables = (plan.skipped.key.to(dtype), plan.skipped.value.to(dtype))
    key, value = tables if plan.skipped.of_each_tile else (x.unsqueeze(2) for x in tables)
    return StandIns(key, value, plan.stand_in_bias())


def stand_in_args(tables: StandIns | None) -> tuple:
    """The tables, their strides for batch, head and tile (0 where one holds for all), and the number of clusters."""
    if tables is None:
        return (None, 0, 0, 0, None, 0, 0, 0, None, 0, 0, 0, 0)
    arguments: list = []
    for table in tables:
        table = rows_contiguous(table)
        if table.ndim == 5 and table.stride(-2) != table.shape[-1]:
            table = table.contiguous()
        arguments += [table, *(table.stride(i) if table.shape[i] > 1 else 0 for i in range(3))]
    return *arguments, tables.bias.shape[-1]


@triton.jit
def _scores(q, factor, key_ptr, bias_ptr, rows, inside, D: tl.constexpr, D_PAD: tl.constexpr):
    """The keys of some stand-ins, and their scores in base 2; -inf for those that do not count."""
    key = load_rows(key_ptr, rows, D, inside, tl.arange(0, D_PAD), D, D_PAD, True)
    bias = tl.load(bias_ptr + rows, mask=inside, other=float("-inf")) * 1.4426950408889634
    return key, tl.dot(q, tl.trans(key), input_precision="ieee") * factor + bias[None, :]


@triton.jit
def attend_stand_ins(
    state, q, factor, shift, key_ptr, value_ptr, bias_ptr, clusters,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BRANCHED: tl.constexpr,
):  # fmt: skip
    """Add the stand-ins of a tile to its online softmax `(m, total, acc)`, in base 2.

    `shift`, a number or one for each query in a column, is by how much the scores in the state are less than those of
    the keys as they were. `BRANCHED`: the state comes from a walk with a second stage.
    """
    STEP: tl.constexpr = 64 if BLOCK_N > 64 else BLOCK_N  # `min` makes a tensor of them in Triton 3.5
    tables = (q, factor, shift, key_ptr, value_ptr, bias_ptr, clusters)
    if BRANCHED:
        # In more stages products are under way over the end of an iteration. Behind a loop with a branch their
        # accumulator is then moved between registers meanwhile, for which ptxas makes all products of the kernel wait
        # for one another (C7515).
        for first in tl.range(0, clusters, STEP, num_stages=1):
            state = _attend_some(state, tables, first, D, D_PAD, STEP)
    else:
        for first in range(0, clusters, STEP):
            state = _attend_some(state, tables, first, D, D_PAD, STEP)
    return state


@triton.jit
def _attend_some(state, tables, first, D: tl.constexpr, D_PAD: tl.constexpr, STEP: tl.constexpr):
    m, total, acc = state
    q, factor, shift, key_ptr, value_ptr, bias_ptr, clusters = tables
    rows = first + tl.arange(0, STEP)
    inside = rows < clusters
    _, scores = _scores(q, factor, key_ptr, bias_ptr, rows, inside, D, D_PAD)
    scores -= shift
    new_m = tl.maximum(m, tl.max(scores, 1))
    # A tile without keys of its own may meet clusters that do not count before the first that does: m is finite then.
    p = tl.exp2(scores - new_m[:, None])
    shrink = tl.exp2(m - new_m)
    value = load_parts(acc, value_ptr, rows, D, inside, D, D_PAD, True)
    return new_m, total * shrink + tl.sum(p, 1), add_products(acc, shrink, p, value, D_PAD, None)


@triton.jit
def stand_ins_to_queries(
    dq, q, grad, lse2, delta, factor, key_ptr, value_ptr, bias_ptr, clusters,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the stand-ins of a tile add to the gradient of its queries, but for the scale of the scores."""
    d = tl.arange(0, D_PAD)
    STEP: tl.constexpr = 64 if BLOCK_N > 64 else BLOCK_N
    for first in range(0, clusters, STEP):
        rows = first + tl.arange(0, STEP)
        inside = rows < clusters
        key, scores = _scores(q, factor, key_ptr, bias_ptr, rows, inside, D, D_PAD)
        p = tl.exp2(scores - lse2[:, None])
        value = load_rows(value_ptr, rows, D, inside, d, D, D_PAD, True)
        grad_scores = p * (tl.dot(grad, tl.trans(value), input_precision="ieee") - delta[:, None])
        dq = tl.dot(grad_scores.to(key.dtype), key, dq, input_precision="ieee")
    return dq
