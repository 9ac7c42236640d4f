"""The forward pass of attention over a `BlockPlan`, as a Triton kernel.

One program computes one *piece*: at most `BLOCK_M` queries of one tile, of one head. It walks the runs of keys of that
tile with an online softmax (FlashAttention-2, arXiv 2307.08691) in base 2 and float32; how is in `walk.py`. What stands
for the keys that a tile skips is a second walk (`stand_ins.py`).

Where the GPU has a copy engine for tiles (compute capability 9 and up), keys and values come through tensor descriptors
(`descriptors.py`): a tile may start at any row, so runs need not be aligned, and what lies behind a tail is masked.
Triton's own warp specialisation was measured beside that on an H200 and left: 12.6 ms where this kernel took 12.3, and
NaN with three stages (`benchmarks/results/h200/`).

Orders: the rows of queries are read, and the outputs written, through `q_order`, since each is touched once. Keys and
values are read by many tiles, so by default they are copied in permuted order first (`gather_kv=False`: the memory of
one more k and v, and about 3 % of the time at density .1 on an H200); `gather_kv=True` reads them through `kv_order`
instead, without the copies and without descriptors. Where `kv_order` has more heads than k and v, the copies have as
many as it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..plan import BlockPlan
from .columns import part_width, store_parts, zero_parts
from .descriptors import describe
from .forward_steps import (
    FP8_LIFT,
    NO_MAXIMUM,
    UNREAD_MAXIMUM,
    attend_described_tile,
    attend_int8_block,
    attend_int8_tile,
    attend_tile,
)
from .launch import FUSED, Tiles, choose_tiles, major_of, on_device, order_args, padded, plan_strides, rows_contiguous
from .stand_ins import StandIns, attend_stand_ins, stand_in_args
from .walk import Walk, find_piece, load_rows, make_walk, token_rows, walk_keys

# By (major compute capability, padded head_dim, bytes per element); 0 is any other GPU, and the interpreter. That of
# (9, 128, 2) is measured (`benchmarks/results/h200/`), that of (9, 64, 2) taken over from it; the others are initial
# values, chosen by what the compiler makes of them. float32 is computed exactly and not in TF32, so without tensor
# cores, in small tiles.
FORWARD_TILES = {
    (9, 64, 2): Tiles(128, 128, 8, 3, tail=64, described=True),
    (9, 128, 2): Tiles(128, 128, 8, 3, tail=64, described=True),
    (9, 256, 2): Tiles(128, 32, 8, 2),
    (10, 64, 2): Tiles(128, 64, 4, 3),
    (10, 128, 2): Tiles(128, 64, 8, 3),
    (10, 256, 2): Tiles(128, 32, 8, 2),
    (0, 64, 2): Tiles(128, 32, 4, 3),
    (0, 128, 2): Tiles(128, 32, 8, 3),
    (0, 256, 2): Tiles(64, 16, 4, 2),
    (0, 64, 4): Tiles(32, 32, 4, 2),
    (0, 128, 4): Tiles(32, 32, 8, 1),
    (0, 256, 4): Tiles(16, 16, 8, 1),
}

SCATTERED = 64  # run slots a tile: more are those of clusters
# For plans of many short runs and uneven tiles (clusters), and of tiles that do not fill the larger ones. A small tile
# wastes least there, and short tails more than make up for what it costs: measured for a head_dim of 128
# (`benchmarks/results/h200/`).
SCATTERED_TILES = {
    (9, 64, 2): Tiles(64, 64, 4, 3, tail=32, described=True),
    (9, 128, 2): Tiles(64, 64, 4, 3, tail=32, described=True),
}
# With a second stage, which is decided for all rows of a program: those of one warp group. Where there are none, what a
# branch costs is shared by more keys.
SECOND_STAGE_TILES = SCATTERED_TILES | {
    (10, 64, 2): Tiles(64, 64, 4, 3),
    (10, 128, 2): Tiles(64, 64, 4, 3),
    (0, 128, 2): Tiles(128, 64, 8, 2),
}


# -- the forward kernel ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pieces", "tiles", "slots", "n_q", "n_kv", "q_order_sh", "kv_order_sh"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, k_tail_ptr, v_tail_ptr, out_ptr, lse_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, lse_shift_ptr,
    whole_q_ptr, whole_q_sb, whole_q_sh, whole_q_sn,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, out_sb, out_sh, out_sn,
    q_order_ptr, q_order_sb, q_order_sh, kv_order_ptr, kv_order_sb, kv_order_sh,
    piece_start_ptr, piece_len_ptr, piece_tile_ptr,
    full_start_ptr, full_tiles_ptr, full_count_ptr, tail_start_ptr, tail_len_ptr, tail_count_ptr,
    skip_key_ptr, skip_key_sb, skip_key_sh, skip_key_st, skip_value_ptr, skip_value_sb, skip_value_sh, skip_value_st,
    skip_bias_ptr, skip_bias_sb, skip_bias_sh, skip_bias_st, clusters,
    plan_sb, plan_sh, heads, k_group, v_group, n_q, n_kv, pieces, tiles, slots, tail_slots, qk_scale, bound,
    D: tl.constexpr, D_PAD: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    Q_ORDERED: tl.constexpr, GATHER_KV: tl.constexpr, DESCRIBED: tl.constexpr, STAND_INS: tl.constexpr,
    K_BLOCKED: tl.constexpr,
):  # fmt: skip
    """`DESCRIBED`: k, v and their tails are tensor descriptors; their "strides" are the row of a batch entry, that of a
    head, and the column of a head. `k_group` and `v_group`: query heads that share a head of k, and of v. With int8,
    `whole_q` are the queries that stand-ins meet, as they were, and `K_BLOCKED` says that k has a scale for each tile.
    """
    b, h, start, size, tile = find_piece(
        piece_start_ptr, piece_len_ptr, piece_tile_ptr, plan_sb, plan_sh, heads, pieces, tiles
    )
    if size == 0:
        return
    head = b * heads + h
    k_head = h // k_group
    v_head = h // v_group
    d = tl.arange(0, D_PAD)
    inside_m = tl.arange(0, BLOCK_M) < size
    positions = start + tl.arange(0, BLOCK_M)
    q_rows = token_rows(
        q_order_ptr + b * q_order_sb + h * q_order_sh if Q_ORDERED else q_ptr, positions, inside_m, Q_ORDERED, True
    )
    q_ptr += b * q_sb + h * q_sh
    if q_ptr.dtype.element_ty == tl.int8:
        q = load_rows(q_ptr, positions, q_sn, inside_m, d, D, D_PAD, True)
        factor = tl.load(q_scale_ptr + head * n_q + positions, mask=inside_m, other=1.0)
        k_scale_ptr += (b * (heads // k_group) + k_head) * (tl.cdiv(n_kv, BLOCK_N) if K_BLOCKED else n_kv)
    else:
        q = load_rows(q_ptr, q_rows, q_sn, inside_m, d, D, D_PAD, True)
        factor = qk_scale
    if GATHER_KV:
        kv_order_ptr += b * kv_order_sb + h * kv_order_sh

    m = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
    if bound is not None:
        m = tl.where(inside_m, m, UNREAD_MAXIMUM)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_parts(BLOCK_M, D_PAD, PART)
    if DESCRIBED:
        k_row = (b * k_sb + k_head * k_sh).to(tl.int32)
        v_row = (b * v_sb + v_head * v_sh).to(tl.int32)
        k_column = (k_head * k_sn).to(tl.int32)
        v_column = (v_head * v_sn).to(tl.int32)
        m, total, acc = walk_keys(
            attend_described_tile, (m, total, acc),
            (q, k_ptr, v_ptr, k_tail_ptr, v_tail_ptr, k_row, v_row, k_column, v_column, factor, bound),
            tile, slots, tail_slots, kv_order_ptr,
            full_start_ptr, full_tiles_ptr, full_count_ptr, tail_start_ptr, tail_len_ptr, tail_count_ptr,
            D, D_PAD, BLOCK_N, TAIL_N, False,
        )  # fmt: skip
    else:
        k_ptr += b * k_sb + k_head * k_sh
        values = v_ptr + b * v_sb + v_head * v_sh
        if q_ptr.dtype.element_ty != tl.int8:
            STEP: tl.constexpr = attend_tile
            inputs = (q, k_ptr, values, k_sn, v_sn, factor, bound)
        elif K_BLOCKED:
            STEP: tl.constexpr = attend_int8_block  # type: ignore[no-redef]
            inputs = (q, k_ptr, values, k_sn, v_sn, factor, k_scale_ptr, bound, BLOCK_N)  # type: ignore[assignment]
        else:
            STEP: tl.constexpr = attend_int8_tile  # type: ignore[no-redef]
            inputs = (q, k_ptr, values, k_sn, v_sn, factor, k_scale_ptr, bound)  # type: ignore[assignment]
        m, total, acc = walk_keys(
            STEP, (m, total, acc), inputs, tile, slots, tail_slots, kv_order_ptr,
            full_start_ptr, full_tiles_ptr, full_count_ptr, tail_start_ptr, tail_len_ptr, tail_count_ptr,
            D, D_PAD, BLOCK_N, TAIL_N, GATHER_KV,
        )  # fmt: skip
    if STAND_INS:
        place = tile - (b * plan_sb + h * plan_sh) * tiles
        shift = 0.0
        if q_ptr.dtype.element_ty == tl.int8:
            # The keys were smoothed, the stand-ins are not: the scores of a query differ by one number.
            whole_q_ptr += b * whole_q_sb + h * whole_q_sh
            q = load_rows(whole_q_ptr, q_rows, whole_q_sn, inside_m, d, D, D_PAD, True)
            shift = tl.load(lse_shift_ptr + head * n_q + positions, mask=inside_m, other=0.0)
            shift = (shift * 1.4426950408889634)[:, None]
        m, total, acc = attend_stand_ins(
            (m, total, acc), q, qk_scale, shift,
            skip_key_ptr + b * skip_key_sb + h * skip_key_sh + place * skip_key_st,
            skip_value_ptr + b * skip_value_sb + h * skip_value_sh + place * skip_value_st,
            skip_bias_ptr + b * skip_bias_sb + h * skip_bias_sh + place * skip_bias_st,
            clusters, D, D_PAD, BLOCK_N, bound is not None,
        )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = m + tl.log2(total)
    if not DESCRIBED and v_ptr.dtype.element_ty == tl.float8e4nv:
        v_scale_ptr += (b * (heads // v_group) + v_head) * D
        lse -= FP8_LIFT
    lse *= 0.6931471805599453
    if q_ptr.dtype.element_ty == tl.int8:
        lse += tl.load(lse_shift_ptr + head * n_q + positions, mask=inside_m, other=0.0)
    store_parts(out_ptr + b * out_sb + h * out_sh, q_rows, out_sn, inside_m, acc, total, v_scale_ptr, D, D_PAD)
    tl.store(lse_ptr + head * n_q + q_rows, tl.where(empty, float("-inf"), lse), mask=inside_m)


# -- launch -----------------------------------------------------------------------------------------------------------


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    q_order: torch.Tensor | None,
    kv_order: torch.Tensor | None,
    qk_scale: float,
    tiles: Tiles,
    scales: tuple[torch.Tensor | None, ...] = (None, None, None, None),
    stand_ins: StandIns | None = None,
    walk: Walk | None = None,
    whole_q: torch.Tensor | None = None,
    k_blocked: bool = False,
    bound: float | None = None,
) -> None:
    """Run the forward kernel into `out` and `lse`.

    Args:
        q: `[B, H, n_q, D]`. k: `[B, Hk, n_kv, D]`. v: `[B, Hv, n_kv, D]`. H is a multiple of Hk and of Hv. All with
            `stride(-1) == 1`; int8 q and k, and fp8 v, in permuted order.
        plan: tiles and runs; its own orders are not read.
        q_order: where a permuted query lies in `out`, and in q unless that is int8. kv_order: likewise in k and v.
        qk_scale: multiplies the scores, in base 2; of int8 those of stand-ins alone.
        scales: the scales of q, k and v and what to add to the log-sum-exp, where q and k are int8 (v: fp8).
        stand_ins: of the clusters that each tile skips; not with fp8.
        walk: of this plan and these tiles, where it is at hand.
        whole_q: q before it was int8, with stand-ins.
        k_blocked: k has one scale for each `block_n` keys, at multiples of which all runs start, and not one a key.
        bound: leave out a tile of keys whose scores, in base 2, all lie so far below the running maxima; None for none.
    """
    walk = walk or make_walk(plan, tiles.block_m, tiles.block_n, tiles.tail_n)
    (batch, heads), dim = q.shape[:2], q.shape[3]
    pieces, d_pad = walk.piece_len.shape[-1], max(padded(dim), 32 // q.element_size())
    described = describe(k, v, tiles) if tiles.described and kv_order is None and qk_scale > 0 else None
    keys, places = described or ((k, v, None, None), (*k.stride()[:3], *v.stride()[:3]))
    with on_device(q):
        _forward_kernel[(pieces * batch * heads,)](
            q, *keys, out, lse, *scales, whole_q, *(q if whole_q is None else whole_q).stride()[:3],
            *q.stride()[:3], *places, *out.stride()[:3],
            *order_args(q_order, heads), *order_args(kv_order, heads), *walk, *stand_in_args(stand_ins),
            *plan_strides(plan.tile_len.shape), heads, heads // k.shape[1], heads // v.shape[1],
            plan.n_q, plan.n_kv, pieces, plan.tile_len.shape[-1],
            walk.full_start.shape[-1], walk.tail_start.shape[-1], qk_scale, bound,
            D=dim, D_PAD=d_pad, PART=part_width(major_of(q), d_pad, tiles, v.element_size(), bound is not None),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, TAIL_N=tiles.tail_n,
            Q_ORDERED=q_order is not None, GATHER_KV=kv_order is not None,
            DESCRIBED=described is not None, STAND_INS=stand_ins is not None, K_BLOCKED=k_blocked,
            **FUSED, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip


def forward_tiles(q: torch.Tensor, plan: BlockPlan) -> Tiles:
    """The launch configuration for a plan; reads shapes only."""
    if plan.pv_threshold is not None:
        return choose_tiles(FORWARD_TILES | SECOND_STAGE_TILES, q, plan.tile_len)
    many_runs, small_tiles = plan.run_len.shape[-1] > SCATTERED, plan.n_q <= 64 * plan.tile_len.shape[-1]
    return choose_tiles(
        FORWARD_TILES | SCATTERED_TILES if many_runs or small_tiles else FORWARD_TILES, q, plan.tile_len
    )


def results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the output and the log-sum-exp."""
    return torch.empty_like(rows_contiguous(q)), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
