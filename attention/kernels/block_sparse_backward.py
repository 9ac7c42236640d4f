"""The backward pass of attention over a `BlockPlan`, without atomics, hence the same bits in every run.

With P the attention weights and D_i = sum_d dO_id O_id - dLSE_i (FlashAttention-2, arXiv 2307.08691, section 3.1.2; the
log-sum-exp has the gradient P with respect to the scores, so its own gradient enters by D alone):

    dV = P^T dO,    dS = P * (dO V^T - D),    dQ = scale * dS K,    dK = scale * dS^T Q

Three kernels. The first makes D. The second makes dQ with the walk of the forward pass. The third makes dK and dV: one
program a block of `BLOCK_N` keys, aligned in permuted order, that walks the query tiles which read any of its keys.
Which of the keys such a tile reads is a bit each, in 64-bit words per (tile, key block), since runs may start and end
inside of a block. The words take `8 * T * ceil(n_kv / 64)` bytes per plan entry, and the lists of tiles
`4 * T * ceil(n_kv / BLOCK_N)`, which is quadratic: so they are made for as many heads at a time as `READERS_BYTES`
hold. A plan that is one for all heads keeps them. All shapes depend on no value, so there is no host sync.
Query heads that share a head of k and v may have its keys in different orders, so each writes a dK and dV of its own,
and these are added up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..plan import BlockPlan
from .launch import (
    FUSED,
    LOG2E,
    Tiles,
    choose_tiles,
    on_device,
    order_args,
    padded,
    plan_strides,
    rows_contiguous,
)
from .permute import keys_in_order
from .readers import readers_of, tables_of, words_of
from .stand_ins import StandIns, stand_in_args, stand_ins_to_queries
from .walk import Walk, find_piece, load_rows, make_walk, store_rows, token_rows, walk_keys, walk_of_plan

# Keyed like FORWARD_TILES; values chosen by what the compiler makes of them, not yet tuned by measurement.
QUERY_TILES = {
    (9, 64, 2): Tiles(128, 64, 8, 2),
    (9, 128, 2): Tiles(128, 64, 8, 2),
    (9, 256, 2): Tiles(64, 32, 8, 2),
    (10, 64, 2): Tiles(128, 64, 8, 2),
    (10, 128, 2): Tiles(64, 64, 4, 2),
    (10, 256, 2): Tiles(64, 32, 8, 2),
    (0, 64, 2): Tiles(64, 32, 4, 2),
    (0, 128, 2): Tiles(128, 32, 8, 2),
    (0, 256, 2): Tiles(32, 16, 4, 1),
    (0, 64, 4): Tiles(32, 32, 4, 1),
    (0, 128, 4): Tiles(16, 32, 8, 1),
    (0, 256, 4): Tiles(16, 16, 8, 1),
}
KEY_TILES = {
    (9, 64, 2): Tiles(64, 64, 4, 2),
    (9, 128, 2): Tiles(64, 128, 8, 2),
    (9, 256, 2): Tiles(32, 32, 8, 1),
    (10, 64, 2): Tiles(64, 64, 4, 2),
    (10, 128, 2): Tiles(64, 64, 8, 2),
    (10, 256, 2): Tiles(32, 32, 8, 1),
    (0, 64, 2): Tiles(32, 64, 4, 2),
    (0, 128, 2): Tiles(32, 128, 8, 2),
    (0, 256, 2): Tiles(16, 32, 4, 1),
    (0, 64, 4): Tiles(32, 32, 4, 1),
    (0, 128, 4): Tiles(16, 32, 4, 1),
    (0, 256, 4): Tiles(16, 16, 4, 1),
}
CHUNK = 64  # rows a program of _delta_kernel
WALK = len(Walk._fields)


@triton.jit
def _delta_kernel(
    grad_ptr, out_ptr, grad_lse_ptr, delta_ptr, grad_sb, grad_sh, grad_sn, out_sb, out_sh, out_sn, heads, n_q,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_q, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = head // heads
    h = head % heads
    d = tl.arange(0, D_PAD)
    inside = rows < n_q
    grad = load_rows(grad_ptr + b * grad_sb + h * grad_sh, rows, grad_sn, inside, d, D, D_PAD, True)
    out = load_rows(out_ptr + b * out_sb + h * out_sh, rows, out_sn, inside, d, D, D_PAD, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    delta -= tl.load(grad_lse_ptr + head * n_q + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + head * n_q + rows, delta, mask=inside)


@triton.jit
def _query_tile(state, inputs, first, keys, rows, inside, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """What a tile of keys adds to the gradient of the queries."""
    (dq,) = state
    q, grad, lse2, delta, k_ptr, v_ptr, k_sn, v_sn, qk_scale = inputs
    d = tl.arange(0, D_PAD)
    k = load_rows(k_ptr, rows, k_sn, inside, d, D, D_PAD, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    p = tl.exp2(scores - lse2[:, None])
    v = load_rows(v_ptr, rows, v_sn, inside, d, D, D_PAD, MASKED)
    grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
    grad_scores = p * (grad_p - delta[:, None])
    return (tl.dot(grad_scores.to(k.dtype), k, dq, input_precision="ieee"),)


@triton.jit(do_not_specialize=["pieces", "tiles", "slots"])
def _query_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, lse_ptr, delta_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, grad_sb, grad_sh, grad_sn, dq_sb, dq_sh, dq_sn,
    q_order_ptr, q_order_sb, q_order_sh, kv_order_ptr, kv_order_sb, kv_order_sh,
    piece_start_ptr, piece_len_ptr, piece_tile_ptr,
    full_start_ptr, full_tiles_ptr, full_count_ptr, tail_start_ptr, tail_len_ptr, tail_count_ptr,
    skip_key_ptr, skip_key_sb, skip_key_sh, skip_key_st, skip_value_ptr, skip_value_sb, skip_value_sh, skip_value_st,
    skip_bias_ptr, skip_bias_sb, skip_bias_sh, skip_bias_st, clusters,
    plan_sb, plan_sh, heads, group, n_q, pieces, tiles, slots, tail_slots, scale, qk_scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    Q_ORDERED: tl.constexpr, GATHER_KV: tl.constexpr, STAND_INS: tl.constexpr,
):  # fmt: skip
    b, h, start, size, tile = find_piece(
        piece_start_ptr, piece_len_ptr, piece_tile_ptr, plan_sb, plan_sh, heads, pieces, tiles
    )
    if size == 0:
        return
    head = b * heads + h
    d = tl.arange(0, D_PAD)
    inside_m = tl.arange(0, BLOCK_M) < size
    q_rows = token_rows(
        q_order_ptr + b * q_order_sb + h * q_order_sh if Q_ORDERED else q_ptr,
        start + tl.arange(0, BLOCK_M), inside_m, Q_ORDERED, True,
    )  # fmt: skip
    q = load_rows(q_ptr + b * q_sb + h * q_sh, q_rows, q_sn, inside_m, d, D, D_PAD, True)
    grad = load_rows(grad_ptr + b * grad_sb + h * grad_sh, q_rows, grad_sn, inside_m, d, D, D_PAD, True)
    lse2 = tl.load(lse_ptr + head * n_q + q_rows, mask=inside_m, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + head * n_q + q_rows, mask=inside_m, other=0.0)
    if GATHER_KV:
        kv_order_ptr += b * kv_order_sb + h * kv_order_sh
    k_ptr += b * k_sb + h // group * k_sh
    v_ptr += b * v_sb + h // group * v_sh
    (dq,) = walk_keys(
        _query_tile, (tl.zeros([BLOCK_M, D_PAD], tl.float32),),
        (q, grad, lse2, delta, k_ptr, v_ptr, k_sn, v_sn, qk_scale),
        tile, slots, tail_slots, kv_order_ptr,
        full_start_ptr, full_tiles_ptr, full_count_ptr, tail_start_ptr, tail_len_ptr, tail_count_ptr,
        D, D_PAD, BLOCK_N, TAIL_N, GATHER_KV,
    )  # fmt: skip
    if STAND_INS:
        place = tile - (b * plan_sb + h * plan_sh) * tiles
        dq = stand_ins_to_queries(
            dq, q, grad, tl.where(lse2 == float("-inf"), 0.0, lse2), delta, qk_scale,
            skip_key_ptr + b * skip_key_sb + h * skip_key_sh + place * skip_key_st,
            skip_value_ptr + b * skip_value_sb + h * skip_value_sh + place * skip_value_st,
            skip_bias_ptr + b * skip_bias_sb + h * skip_bias_sh + place * skip_bias_st,
            clusters, D, D_PAD, BLOCK_N,
        )  # fmt: skip
    store_rows(dq_ptr + b * dq_sb + h * dq_sh, q_rows, dq_sn, inside_m, d, dq * scale, D)


@triton.jit(do_not_specialize=["blocks", "tiles", "first_head", "first_entry"])
def _key_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, grad_sb, grad_sh, grad_sn,
    dk_sb, dk_sh, dk_sn, dv_sb, dv_sh, dv_sn,
    q_order_ptr, q_order_sb, q_order_sh, kv_order_ptr, kv_order_sb, kv_order_sh,
    tile_start_ptr, tile_len_ptr, bits_ptr, block_ptr, readers_ptr, steps_ptr,
    plan_sb, plan_sh, heads, group, n_q, n_kv, blocks, tiles, first_head, first_entry, scale, qk_scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr, Q_ORDERED: tl.constexpr, KV_ORDERED: tl.constexpr, GATHER_KV: tl.constexpr,
):  # fmt: skip
    """`WORDS` of 64 bits a block, 1 or 2. The heads are those from `first_head` on, over all batch entries, and the
    tables those of the plan's entries from `first_entry` on.
    """
    head = (tl.program_id(0) // blocks + first_head).to(tl.int64)
    b = head // heads
    h = head % heads
    entry = b * plan_sb + h * plan_sh - first_entry
    block = tl.load(block_ptr + entry * blocks + tl.program_id(0) % blocks)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    keys = block * BLOCK_N + offs_n
    inside_n = keys < n_kv
    tokens = token_rows(
        kv_order_ptr + b * kv_order_sb + h * kv_order_sh if KV_ORDERED else k_ptr, keys, inside_n, KV_ORDERED, True
    )
    rows = tokens if GATHER_KV else keys
    k = load_rows(k_ptr + b * k_sb + h // group * k_sh, rows, k_sn, inside_n, d, D, D_PAD, True)
    v = load_rows(v_ptr + b * v_sb + h // group * v_sh, rows, v_sn, inside_n, d, D, D_PAD, True)
    q_ptr += b * q_sb + h * q_sh
    grad_ptr += b * grad_sb + h * grad_sh
    if Q_ORDERED:
        q_order_ptr += b * q_order_sb + h * q_order_sh
    lse_ptr += head * n_q
    delta_ptr += head * n_q
    tile_start_ptr += entry * tiles
    tile_len_ptr += entry * tiles
    bits_ptr += (entry * tiles * blocks + block) * WORDS
    readers_ptr += (entry * blocks + block) * (tiles + 1)
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, D_PAD], tl.float32)

    reader = 0
    tile = tl.load(readers_ptr)
    start = tl.load(tile_start_ptr + tile)
    left = tl.load(tile_len_ptr + tile)
    for _ in range(tl.load(steps_ptr + entry * blocks + block)):
        at = bits_ptr + tile.to(tl.int64) * blocks * WORDS
        bits = tl.load(at)
        if WORDS == 2:
            bits = tl.where(offs_n < 64, bits, tl.load(at + 1))
        inside_m = offs_m < left
        read = ((bits >> (offs_n % 64).to(tl.int64)) & 1) != 0
        q_rows = token_rows(q_order_ptr, start + offs_m, inside_m, Q_ORDERED, True)
        q = load_rows(q_ptr, q_rows, q_sn, inside_m, d, D, D_PAD, True)
        lse2 = tl.load(lse_ptr + q_rows, mask=inside_m, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + q_rows, mask=inside_m, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale
        # Rows beyond the tile are 0 in q, the gradient, the log-sum-exp and delta: they add nothing.
        p = tl.exp2(tl.where(read[:, None], scores - lse2[None, :], float("-inf")))
        grad = load_rows(grad_ptr, q_rows, grad_sn, inside_m, d, D, D_PAD, True)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        grad_p = tl.dot(v, tl.trans(grad), input_precision="ieee")
        grad_scores = p * (grad_p - delta[None, :])
        dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision="ieee")
        # One piece on: within the tile, or to the next tile that reads this block.
        done = left <= BLOCK_M
        reader += done.to(tl.int32)
        tile = tl.load(readers_ptr + reader)
        start = tl.where(done, tl.load(tile_start_ptr + tile), start + BLOCK_M)
        left = tl.where(done, tl.load(tile_len_ptr + tile), left - BLOCK_M)
    store_rows(dk_ptr + b * dk_sb + h * dk_sh, tokens, dk_sn, inside_n, d, dk * scale, D)
    store_rows(dv_ptr + b * dv_sb + h * dv_sh, tokens, dv_sn, inside_n, d, dv, D)


def backward_tiles(q: torch.Tensor, tile_len: torch.Tensor) -> Tiles:
    """The tiles of the kernel that makes dQ, for whose walk they count."""
    return choose_tiles(QUERY_TILES, q, tile_len)


def backward_walk(plan: BlockPlan, q: torch.Tensor) -> list[torch.Tensor]:
    """What the kernels make of a plan before they run, kept on it: its walk, and its readers where they are kept."""
    known = walk_of_plan(plan, backward_tiles(q, plan.tile_len))
    return known + readers_of(plan, choose_tiles(KEY_TILES, q, plan.tile_len))


@torch.library.custom_op("vidaccel::block_sparse_attention_backward", mutates_args=())
def block_sparse_attention_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tile_start: torch.Tensor,
    tile_len: torch.Tensor,
    run_start: torch.Tensor,
    run_len: torch.Tensor,
    q_order: torch.Tensor | None,
    kv_order: torch.Tensor | None,
    skip_key: torch.Tensor | None,
    skip_value: torch.Tensor | None,
    skip_bias: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    walk: Sequence[torch.Tensor],
    scale: float,
    gather_kv: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `block_sparse_attention`.

    Args:
        grad_out: `[B, H, n_q, D]`. grad_lse: `[B, H, n_q]` float32.
        out, lse: what the forward pass returned.
        walk: `backward_walk` of the plan, or empty: it is then made. The rest are the arguments of the forward pass.

    Returns:
        The gradients of q, k and v, in their shapes, dtypes and layouts.
    """
    dq, dk, dv = _results(q, k, v)
    q, grad_out, out = (rows_contiguous(x) for x in (q, grad_out, out))
    plan = BlockPlan(q.shape[2], k.shape[2], tile_start, tile_len, run_start, run_len)
    (batch, heads), dim = q.shape[:2], q.shape[3]
    shape = {"D": dim, "D_PAD": padded(dim)}
    delta = torch.empty_like(lse)
    orders = {"Q_ORDERED": q_order is not None, "GATHER_KV": kv_order is not None and gather_kv}
    of_k, of_v = dk, dv  # of each query head
    if k.shape[1] != heads:
        of_k, of_v = (x.new_empty(batch, heads, *x.shape[2:]) for x in (k, v))
    k, v, load_order = keys_in_order(k, v, kv_order, gather_kv)
    group = heads // k.shape[1]
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3])
    with on_device(q):
        _delta_kernel[(batch * heads * triton.cdiv(plan.n_q, CHUNK),)](
            grad_out, out, grad_lse.contiguous(), delta, *grad_out.stride()[:3], *out.stride()[:3], heads, plan.n_q,
            **shape, BLOCK_M=CHUNK, **FUSED,
        )  # fmt: skip

        tiles = backward_tiles(q, tile_len)
        known = Walk(*walk[:WALK]) if walk else make_walk(plan, tiles.block_m, tiles.block_n, tiles.tail_n)
        stand_ins = None if skip_key is None else StandIns(skip_key, skip_value, skip_bias)
        pieces = known.piece_len.shape[-1]
        _query_kernel[(pieces * batch * heads,)](
            q, k, v, grad_out, dq, lse, delta, *inputs, *dq.stride()[:3],
            *order_args(q_order, heads), *order_args(load_order, heads), *known, *stand_in_args(stand_ins),
            *plan_strides(tile_len.shape), heads, group, plan.n_q, pieces, tile_len.shape[-1],
            known.full_start.shape[-1], known.tail_start.shape[-1], scale, scale * LOG2E, **shape, **orders,
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, TAIL_N=tiles.tail_n, STAND_INS=stand_ins is not None,
            **FUSED, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip

        tiles = choose_tiles(KEY_TILES, q, tile_len)
        blocks = -(-plan.n_kv // tiles.block_n)
        for first, readers, ranges in tables_of(plan, tiles, walk[WALK:], batch, heads):
            for begin, end in ranges:
                _key_kernel[(blocks * (end - begin),)](
                    q, k, v, grad_out, of_k, of_v, lse, delta, *inputs, *of_k.stride()[:3], *of_v.stride()[:3],
                    *order_args(q_order, heads), *order_args(kv_order, heads), *readers,
                    *plan_strides(tile_len.shape), heads, group, plan.n_q, plan.n_kv, blocks, tile_len.shape[-1],
                    begin, first, scale, scale * LOG2E, **shape, **orders, KV_ORDERED=kv_order is not None,
                    WORDS=words_of(tiles.block_n), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
                    **FUSED, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
                )  # fmt: skip
    if of_k is not dk:
        for whole, parts in ((dk, of_k), (dv, of_v)):
            torch.sum(parts.unflatten(1, (whole.shape[1], -1)), 2, out=whole)
    return dq, dk, dv


@block_sparse_attention_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *rest):
    return _results(q, k, v)


def _results(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Memory for the gradients."""
    return tuple(torch.empty_like(rows_contiguous(x)) for x in inputs)
