"""Attention over a `BlockPlan` with Q K^T in int8, forward only.

The forward kernel of `block_sparse.py` on inputs that `quantize.py` made: Q K^T on the int8 tensor cores with int32
sums, softmax in float32, P V in the dtype of the values, or in fp8 (e4m3, one scale a channel of V and a fixed one for
the weights) where the GPU has it. The design follows SageAttention (arXiv 2410.02367) and, for fp8, SageAttention2
(arXiv 2411.10958), with a scale for each token of Q, and for each token or tile of K; see `quantize.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..plan import BlockPlan
from .block_sparse_forward import launch_forward, results
from .launch import LOG2E, Tiles, choose_tiles, rows_contiguous
from .permute import permute_rows
from .quantize import quantize_qk, quantize_v
from .stand_ins import StandIns
from .walk import Walk, walk_of_plan

# Keyed like FORWARD_TILES, by the dtype of the values; initial values, not yet tuned by measurement. At least 32 keys:
# so many one fp8 product adds.
INT8_TILES = {
    (9, 64, 2): Tiles(128, 64, 4, 3),
    (9, 128, 2): Tiles(128, 64, 8, 3),
    (9, 256, 2): Tiles(128, 32, 8, 2),
    (10, 64, 2): Tiles(128, 64, 4, 3),
    (10, 128, 2): Tiles(128, 64, 8, 3),
    (10, 256, 2): Tiles(128, 32, 8, 2),
    (0, 64, 2): Tiles(128, 64, 8, 3),
    (0, 128, 2): Tiles(128, 64, 8, 2),
    (0, 256, 2): Tiles(64, 32, 8, 2),
    (0, 64, 4): Tiles(32, 32, 4, 2),
    (0, 128, 4): Tiles(32, 32, 8, 1),
    (0, 256, 4): Tiles(16, 32, 8, 1),
}
# Of plans whose runs start at multiples of so many keys and so have next to no tails: 310 instructions for 64 keys,
# where the tile above takes 412.
ALIGNED_TILES = INT8_TILES | {(9, 128, 2): Tiles(128, 128, 8, 2)}
# With fp8 values compute capability 9 needs a second accumulator, and more registers than the larger tiles leave.
FP8_TILES = INT8_TILES | {
    (9, 64, 2): Tiles(128, 64, 8, 3),
    (9, 128, 2): Tiles(128, 32, 8, 3),
    (9, 256, 2): Tiles(64, 32, 8, 2),
}


@torch.library.custom_op("vidaccel::block_sparse_attention_int8", mutates_args=())
def block_sparse_attention_int8(
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
    scale: float,
    gather_kv: bool = False,
    fp8_values: bool = False,
    key_block: int = 0,
    skip_key: torch.Tensor | None = None,
    skip_value: torch.Tensor | None = None,
    skip_bias: torch.Tensor | None = None,
    bound: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a plan with int8 scores as one operator, without a gradient.

    Args:
        q, k, v, tile_start, tile_len, run_start, run_len, q_order, kv_order, scale, skip_key, skip_value, skip_bias,
            bound: as for `block_sparse_attention`; stand-ins are not quantised, and not to be had with fp8.
        walk: `int8_walk_of` the plan, or empty: it is then made.
        gather_kv: read values through `kv_order` instead of copying them in order first; keys are copied, as int8.
        fp8_values: P V in fp8 instead of the dtype of the values, which are then copied as fp8.
        key_block: all runs start at multiples of so many keys; 0 where that is not known.

    Returns:
        `[B, H, n_q, D]` in the dtype and memory layout of q, and the log-sum-exp `[B, H, n_q]` float32 of the scores
        with the unsmoothed keys.
    """
    out, lse = results(q)
    plan = BlockPlan(q.shape[2], k.shape[2], tile_start, tile_len, run_start, run_len)
    tiles, k_block = int8_tiles(q, tile_len, key_block, fp8_values)
    qk = quantize_qk(q, k, q_order, kv_order, scale, k_block)
    v_scale = None
    if fp8_values:
        v, v_scale = quantize_v(v, kv_order)
        kv_order = None
    elif kv_order is not None and not gather_kv:
        v, kv_order = permute_rows(v, kv_order), None
    scales = (qk.q_scale, qk.k_scale, v_scale, qk.lse_shift)
    launch_forward(
        qk.q,
        qk.k,
        rows_contiguous(v),
        out,
        lse,
        plan,
        q_order,
        kv_order,
        scale * LOG2E,
        tiles,
        scales,
        stand_ins=None if skip_key is None else StandIns(skip_key, skip_value, skip_bias),
        walk=Walk(*walk) if walk else None,
        whole_q=None if skip_key is None else rows_contiguous(q),
        k_blocked=k_block > 0,
        bound=None if bound is None else bound * LOG2E,
    )
    return out, lse


def int8_tiles(q: torch.Tensor, tile_len: torch.Tensor, key_block: int, fp8_values: bool) -> tuple[Tiles, int]:
    """The launch configuration, and how many keys share a scale; reads shapes only.

    Those of a tile do where all runs start at multiples of it; otherwise each has its own, and the number is 0.
    """
    if fp8_values:
        return choose_tiles(FP8_TILES, q, tile_len), 0
    tiles = choose_tiles(ALIGNED_TILES, q, tile_len)
    if key_block > 0 and key_block % tiles.block_n == 0:
        return tiles, tiles.block_n
    tiles = choose_tiles(INT8_TILES, q, tile_len)
    return tiles, tiles.block_n if key_block > 0 and key_block % tiles.block_n == 0 else 0


def int8_walk_of(plan: BlockPlan, q: torch.Tensor, key_block: int, fp8_values: bool) -> list[torch.Tensor]:
    """What the kernel makes of a plan before it runs, once for all calls that a plan serves."""
    return walk_of_plan(plan, int8_tiles(q, plan.tile_len, key_block, fp8_values)[0])


@block_sparse_attention_int8.register_fake
def _(q, *rest, **options):
    return results(q)
