"""Attention over a `BlockPlan` as one operator, which autograd and `torch.compile` see whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..gradients import wants_gradient
from ..plan import BlockPlan
from .block_sparse_backward import backward_walk, block_sparse_attention_backward
from .block_sparse_forward import forward_tiles, launch_forward, results
from .launch import LOG2E, rows_contiguous
from .permute import keys_in_order
from .stand_ins import StandIns
from .walk import Walk, walk_of_plan


@torch.library.custom_op("vidaccel::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tile_start: torch.Tensor,
    tile_len: torch.Tensor,
    run_start: torch.Tensor,
    run_len: torch.Tensor,
    q_order: torch.Tensor | None,
    kv_order: torch.Tensor | None,
    walk: Sequence[torch.Tensor],
    backward_walk: Sequence[torch.Tensor],
    scale: float,
    gather_kv: bool,
    skip_key: torch.Tensor | None,
    skip_value: torch.Tensor | None,
    skip_bias: torch.Tensor | None,
    bound: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a plan as one operator, differentiable in q, k and v, also through the log-sum-exp.

    Args:
        q: `[B, H, n_q, D]`, any strides. k, v: `[B, Hkv, n_kv, D]`, H a multiple of Hkv.
        tile_start, tile_len, run_start, run_len, q_order, kv_order: of a `BlockPlan`.
        walk: `walk_of(plan, q)`, or empty: it is then made.
        backward_walk: `backward_walk_of(plan, q, k, v)`, or empty: it is then made where gradients are.
        scale: multiplies the scores.
        gather_kv: read keys and values through `kv_order` instead of copying them in order first.
        skip_key, skip_value, skip_bias: what stands for skipped clusters, as `stand_ins.StandIns` holds it, or None. No
            gradient flows to it.
        bound: leave out a tile of keys whose scores all lie more than this below the largest so far of their query;
            None for none. There is no gradient then.

    Returns:
        `[B, H, n_q, D]` in the dtype and memory layout of q, and the log-sum-exp `[B, H, n_q]` float32. The latter is
        always written: it is 4 bytes a row, and the backward pass needs it.
    """
    out, lse = results(q)
    plan = BlockPlan(q.shape[2], k.shape[2], tile_start, tile_len, run_start, run_len, pv_threshold=bound)
    k, v, kv_order = keys_in_order(k, v, kv_order, gather_kv)
    stand_ins = None if skip_key is None else StandIns(skip_key, skip_value, skip_bias)
    q = rows_contiguous(q)
    known = Walk(*walk) if walk else None
    tiles = forward_tiles(q, plan)
    more: dict[str, Any] = {"stand_ins": stand_ins, "walk": known, "bound": None if bound is None else bound * LOG2E}
    launch_forward(q, k, v, out, lse, plan, q_order, kv_order, scale * LOG2E, tiles, **more)
    return out, lse


def walk_of(plan: BlockPlan, q: torch.Tensor) -> list[torch.Tensor]:
    """What the forward kernel makes of a plan before it runs, once for all calls that a plan serves."""
    return walk_of_plan(plan, forward_tiles(q, plan))


def backward_walk_of(plan: BlockPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """The same of the backward pass; empty where there will be none."""
    if not wants_gradient(q, k, v):
        return []
    return backward_walk(plan, q)


@block_sparse_attention.register_fake
def _(q, *rest, **options):
    return results(q)


def _save(ctx, inputs, output) -> None:
    *tensors, walk, backward_walk, ctx.scale, ctx.gather_kv, skip_key, skip_value, skip_bias, _ = inputs
    ctx.walk, ctx.backward_walk = len(walk), len(backward_walk)
    ctx.save_for_backward(*tensors, skip_key, skip_value, skip_bias, *output, *backward_walk)


def _backward(ctx, grad_out: torch.Tensor, grad_lse: torch.Tensor):
    # None for each argument without a gradient, in the structure of the arguments. None of them has a default, since
    # what is left out would be missing in that structure.
    saved = ctx.saved_tensors
    known = len(saved) - ctx.backward_walk
    walk = list(saved[known:])
    grads = block_sparse_attention_backward(grad_out, grad_lse, *saved[:known], walk, ctx.scale, ctx.gather_kv)
    return *grads, *[None] * 6, [None] * ctx.walk, [None] * ctx.backward_walk, *[None] * 6


block_sparse_attention.register_autograd(_backward, setup_context=_save)
