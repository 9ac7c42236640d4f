"""Attention over a `BlockPlan` with Q K^T in int8, forward only.

The forward kernel of `block_sparse.py` on inputs that `quantize.py` made: Q K^T on the int8 tensor cores with int32
sums, softmax in float32, P V in the dtype of the values, or in fp8 (e4m3, one scale a channel of V and a fixed one for
the weights) where the GPU has it. The design follows SageAttention (arXiv 2410.02367) and, for fp8, SageAttention2
(arXiv 2411.10958), with a scale for each token of Q and K; see `quantize.py`.
"""

from __future__ import annotations

import torch

from ..plan import BlockPlan
from .block_sparse_forward import launch_forward, results
from .launch import Tiles, choose_tiles, rows_contiguous
from .permute import permute_rows
from .quantize import quantize_qk, quantize_v

# Keyed like FORWARD_TILES, by the dtype of the values; initial values, not yet tuned by measurement. At least 32 keys:
# so many one fp8 product adds.
INT8_TILES = {
    (9, 64, 2): Tiles(128, 64, 4, 3),
    (9, 128, 2): Tiles(128, 64, 8, 3),
    (9, 256, 2): Tiles(128, 32, 8, 2),
    (10, 64, 2): Tiles(128, 64, 4, 3),
    (10, 128, 2): Tiles(128, 64, 8, 3),
    (10, 256, 2): Tiles(128, 32, 8, 2),
    (0, 64, 2): Tiles(128, 64, 4, 3),
    (0, 128, 2): Tiles(128, 64, 8, 2),
    (0, 256, 2): Tiles(64, 32, 8, 2),
    (0, 64, 4): Tiles(32, 32, 4, 2),
    (0, 128, 4): Tiles(32, 32, 8, 1),
    (0, 256, 4): Tiles(16, 32, 8, 1),
}
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
    scale: float,
    gather_kv: bool = False,
    fp8_values: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a plan with int8 scores as one operator, without a gradient.

    Args:
        q, k, v, tile_start, tile_len, run_start, run_len, q_order, kv_order, scale: as for `block_sparse_attention`.
        gather_kv: read values through `kv_order` instead of copying them in order first; keys are copied, as int8.
        fp8_values: P V in fp8 instead of the dtype of the values, which are then copied as fp8.

    Returns:
        `[B, H, n_q, D]` in the dtype and memory layout of q, and the log-sum-exp `[B, H, n_q]` float32 of the scores
        with the unsmoothed keys.
    """
    out, lse = results(q)
    plan = BlockPlan(q.shape[2], k.shape[2], tile_start, tile_len, run_start, run_len)
    tiles = choose_tiles(FP8_TILES if fp8_values else INT8_TILES, q, tile_len)
    qk = quantize_qk(q, k, q_order, kv_order, scale)
    v_scale = None
    if fp8_values:
        v, v_scale = quantize_v(v, kv_order)
        kv_order = None
    elif kv_order is not None and not gather_kv:
        v, kv_order = permute_rows(v, kv_order), None
    scales = (qk.q_scale, qk.k_scale, v_scale, qk.lse_shift)
    launch_forward(qk.q, qk.k, rows_contiguous(v), out, lse, plan, q_order, kv_order, 0.0, tiles, scales)
    return out, lse


@block_sparse_attention_int8.register_fake
def _(q, *rest, **options):
    return results(q)
