"""Attention over a `BlockPlan` as Triton kernels: the forward pass, and the operator that autograd and compile see.

One program computes one *piece*: at most `BLOCK_M` queries of one tile, of one head. It walks the runs of keys of that
tile with an online softmax (FlashAttention-2, arXiv 2307.08691) in base 2 and float32.

How runs become tiles of `BLOCK_N` keys: each run is cut, from its own first key, into whole tiles and one tail. The
program walks all whole tiles first, without any mask, then all tails, each masked. Softmax does not care about the
order, and both walks are flat loops, so that the loads of the next tile can be under way while this one is computed.
Runs start anywhere: a tile is loaded row by row, and a row lies where it lies.

What that costs: a tail takes as long as a whole tile. With runs of mean length L, about `BLOCK_N / (2 * L)` more pairs
are computed than the plan names: 21 % for runs of 150 keys and tiles of 64, nothing for plans of aligned blocks.
Packing the tails of several runs into one tile would save most of it, but needs a list of key positions per tile (4
bytes for every tail key of every query tile) and a gather in place of contiguous rows.

Orders: the rows of queries are read, and the outputs written, through `q_order`, since each is touched once. Keys and
values are read by many tiles, so by default they are copied in permuted order first (`gather_kv=False`: the memory of
one more k and v); `gather_kv=True` reads them through `kv_order` instead, without the copies. Which is faster has not
been measured.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..plan import BlockPlan, permute

LOG2E = math.log2(math.e)


class Tiles(NamedTuple):
    """A launch configuration: queries and keys per tile, warps per program, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By (major compute capability, padded head_dim, bytes per element); 0 is any other GPU, and the interpreter. Initial
# values, chosen by the registers and the shared memory that the compiler reports, not yet tuned by measurement. float32
# is computed exactly and not in TF32, so without tensor cores, in small tiles.
FORWARD_TILES = {
    (9, 64, 2): Tiles(128, 64, 4, 3),
    (9, 128, 2): Tiles(128, 64, 8, 3),
    (9, 256, 2): Tiles(128, 32, 8, 2),
    (10, 64, 2): Tiles(128, 64, 4, 3),
    (10, 128, 2): Tiles(128, 64, 8, 3),
    (10, 256, 2): Tiles(128, 32, 8, 2),
    (0, 64, 2): Tiles(128, 32, 4, 3),
    (0, 128, 2): Tiles(64, 32, 4, 2),
    (0, 256, 2): Tiles(64, 16, 4, 2),
    (0, 64, 4): Tiles(32, 32, 4, 2),
    (0, 128, 4): Tiles(32, 32, 8, 1),
    (0, 256, 4): Tiles(16, 16, 8, 1),
}


def choose_tiles(table: dict[tuple[int, int, int], Tiles], q: torch.Tensor, tile_len: torch.Tensor) -> Tiles:
    """The entry of a table for the device, head_dim and dtype of `q [B, H, N, D]`.

    Where the plan's tiles, `tile_len [Bp, Hp, T]`, have fewer than `BLOCK_M` queries on average, rows of a program
    would idle, so `BLOCK_M` is halved down to that mean, and 8 warps become the 4 that work on 64 rows. Reads shapes
    only.
    """
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 0
    width = max(64, padded(q.shape[-1]))
    tiles = table.get((major, width, q.element_size())) or table[0, width, q.element_size()]
    block_m = min(tiles.block_m, padded(-(-q.shape[2] // tile_len.shape[-1])))
    return tiles._replace(block_m=block_m, num_warps=4 if block_m <= 64 < tiles.block_m else tiles.num_warps)


def padded(size: int) -> int:
    """The next power of two, at least the 16 that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


class Walk(NamedTuple):
    """What a query piece reads, on the device, with shapes that depend on no value. `P` pieces, `R + 1` slots.

    Args:
        piece_start, piece_len, piece_tile: `[Bp, Hp, P]` int32; first permuted query, queries (0 is padding), tile;
            the pieces with most keys first, so that what remains at the end of a head is short.
        full_start, full_tiles: `[Bp, Hp, T, R + 1]` int32; of the runs with a whole tile: first key, whole tiles.
        full_count: `[Bp, Hp, T]` int32, whole tiles of all runs together.
        tail_start, tail_len: `[Bp, Hp, T, R + 1]` int32; of the runs with a tail: its first key, its keys.
        tail_count: `[Bp, Hp, T]` int32, tails.
    """

    piece_start: torch.Tensor
    piece_len: torch.Tensor
    piece_tile: torch.Tensor
    full_start: torch.Tensor
    full_tiles: torch.Tensor
    full_count: torch.Tensor
    tail_start: torch.Tensor
    tail_len: torch.Tensor
    tail_count: torch.Tensor


def make_walk(plan: BlockPlan, block_m: int, block_n: int) -> Walk:
    """Cut a plan to pieces of `block_m` queries and its runs to tiles of `block_n` keys; no host sync."""
    full = plan.run_len // block_n
    tail = plan.run_len - full * block_n
    full_start, full_tiles = _to_front(full, plan.run_start, full)
    tail_start, tail_len = _to_front(tail, plan.run_start + full * block_n, tail)
    full_count = full.sum(-1, dtype=torch.int32)
    tail_count = (tail > 0).sum(-1, dtype=torch.int32)
    start, length, tile = plan.cut(block_m)
    work = (full_count + tail_count).gather(-1, tile.long()).masked_fill(length == 0, -1)
    order = work.argsort(-1, descending=True)
    pieces = [x.gather(-1, order).contiguous() for x in (start, length, tile)]
    return Walk(*pieces, full_start, full_tiles, full_count.contiguous(), tail_start, tail_len, tail_count.contiguous())


def _to_front(size: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """The entries of `values [..., R]` where `size > 0`, moved to the front: `[..., R + 1]` contiguous.

    The last slot takes what is dropped, so a kernel may look one entry past the last one it uses.
    """
    kept = size > 0
    slots = size.shape[-1]
    place = torch.where(kept, kept.cumsum(-1) - 1, slots)
    shape = (*size.shape[:-1], slots + 1)
    return [torch.zeros(shape, dtype=x.dtype, device=x.device).scatter_(-1, place, x) for x in values]


# -- device code shared with the backward pass ----------------------------------------------------------------------


@triton.jit
def load_rows(ptr, rows, stride, inside, d, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix, `[len(rows), D_PAD]`; 0 outside of `inside` (when MASKED) and beyond `D`."""
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        tile = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif D < D_PAD:
        tile = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_rows(ptr, rows, stride, inside, d, tile, D: tl.constexpr):
    """Write rows of a matrix in its dtype."""
    at = ptr + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def token_rows(order_ptr, positions, inside, ORDERED: tl.constexpr, MASKED: tl.constexpr):
    """The tokens at permuted positions."""
    if not ORDERED:
        rows = positions
    elif MASKED:
        rows = tl.load(order_ptr + positions, mask=inside, other=0)
    else:
        rows = tl.load(order_ptr + positions)
    return rows


@triton.jit
def next_full_tile(start_ptr, tiles_ptr, slot, key, left, BLOCK_N: tl.constexpr):
    """One whole tile on: within the run, or to the run in the next slot."""
    done = left == 1
    slot += done.to(tl.int64)
    key = tl.where(done, tl.load(start_ptr + slot), key + BLOCK_N)
    left = tl.where(done, tl.load(tiles_ptr + slot), left - 1)
    return slot, key, left


# -- the forward kernel ----------------------------------------------------------------------------------------------


@triton.jit
def _attend_tile(
    q, m, total, acc, k_ptr, v_ptr, k_sn, v_sn, rows, inside, d, qk_scale,
    D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: `m` row maxima, `total` row sums, `acc` unnormalised output."""
    k = load_rows(k_ptr, rows, k_sn, inside, d, D, D_PAD, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    # A tile has at least one key, so the new maximum is finite and the differences are never inf - inf.
    new_m = tl.maximum(m, tl.max(scores, 1))
    shrink = tl.exp2(m - new_m)
    p = tl.exp2(scores - new_m[:, None])
    v = load_rows(v_ptr, rows, v_sn, inside, d, D, D_PAD, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_m, total * shrink + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["pieces", "tiles", "slots"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, out_sb, out_sh, out_sn,
    q_order_ptr, q_order_sb, q_order_sh, kv_order_ptr, kv_order_sb, kv_order_sh,
    piece_start_ptr, piece_len_ptr, piece_tile_ptr,
    full_start_ptr, full_tiles_ptr, full_count_ptr, tail_start_ptr, tail_len_ptr, tail_count_ptr,
    plan_sb, plan_sh, heads, n_q, pieces, tiles, slots, qk_scale,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    Q_ORDERED: tl.constexpr, GATHER_KV: tl.constexpr,
):  # fmt: skip
    # The programs of a head lie side by side: those that run at a time share its keys in the L2 cache.
    piece = tl.program_id(0) % pieces
    head = (tl.program_id(0) // pieces).to(tl.int64)
    b = head // heads
    h = head % heads
    entry = b * plan_sb + h * plan_sh
    size = tl.load(piece_len_ptr + entry * pieces + piece)
    if size == 0:
        return
    start = tl.load(piece_start_ptr + entry * pieces + piece)
    tile = entry * tiles + tl.load(piece_tile_ptr + entry * pieces + piece)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, D_PAD)
    inside_m = offs_m < size
    q_rows = token_rows(
        q_order_ptr + b * q_order_sb + h * q_order_sh if Q_ORDERED else q_ptr, start + offs_m, inside_m, Q_ORDERED, True
    )
    q = load_rows(q_ptr + b * q_sb + h * q_sh, q_rows, q_sn, inside_m, d, D, D_PAD, True)
    k_ptr += b * k_sb + h * k_sh
    v_ptr += b * v_sb + h * v_sh
    if GATHER_KV:
        kv_order_ptr += b * kv_order_sb + h * kv_order_sh

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)

    slot = tile * slots
    key = tl.load(full_start_ptr + slot)
    left = tl.load(full_tiles_ptr + slot)
    for _ in range(tl.load(full_count_ptr + tile)):
        rows = token_rows(kv_order_ptr, key + offs_n, offs_n < BLOCK_N, GATHER_KV, False)
        m, total, acc = _attend_tile(
            q, m, total, acc, k_ptr, v_ptr, k_sn, v_sn, rows, offs_n < BLOCK_N, d, qk_scale, D, D_PAD, False
        )
        slot, key, left = next_full_tile(full_start_ptr, full_tiles_ptr, slot, key, left, BLOCK_N)

    slot = tile * slots
    for i in range(tl.load(tail_count_ptr + tile)):
        key = tl.load(tail_start_ptr + slot + i)
        inside = offs_n < tl.load(tail_len_ptr + slot + i)
        rows = token_rows(kv_order_ptr, key + offs_n, inside, GATHER_KV, True)
        m, total, acc = _attend_tile(
            q, m, total, acc, k_ptr, v_ptr, k_sn, v_sn, rows, inside, d, qk_scale, D, D_PAD, True
        )

    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    store_rows(out_ptr + b * out_sb + h * out_sh, q_rows, out_sn, inside_m, d, out, D)
    tl.store(lse_ptr + head * n_q + q_rows, lse, mask=inside_m)


# -- launch -----------------------------------------------------------------------------------------------------------


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x [..., D]` with its head dimension side by side in memory, as the kernels read it; a view where it can be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def order_args(order: torch.Tensor | None) -> tuple[torch.Tensor | None, int, int]:
    """An order `[1|B, 1|H, N]` and its strides for batch and head, 0 where it is broadcast."""
    if order is None:
        return None, 0, 0
    order = rows_contiguous(order)
    return order, *(order.stride(i) if order.shape[i] > 1 else 0 for i in (0, 1))


def plan_strides(lead: torch.Size) -> tuple[int, int]:
    """How many plan entries lie between neighbouring batch entries and heads, for `lead = (Bp, Hp)`."""
    return lead[1] if lead[0] > 1 else 0, 1 if lead[1] > 1 else 0


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def keys_in_order(
    k: torch.Tensor, v: torch.Tensor, kv_order: torch.Tensor | None, gather_kv: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """k and v as the kernels read them, and the order they still have to be read through, or None."""
    if kv_order is not None and not gather_kv:
        k, v, kv_order = permute(k, kv_order), permute(v, kv_order), None
    return rows_contiguous(k), rows_contiguous(v), kv_order


def _results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the output and the log-sum-exp."""
    return torch.empty_like(rows_contiguous(q)), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


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
    scale: float,
    gather_kv: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a plan as one operator, differentiable in q, k and v, also through the log-sum-exp.

    Args:
        q: `[B, H, n_q, D]`, any strides. k, v: `[B, H, n_kv, D]`.
        tile_start, tile_len, run_start, run_len, q_order, kv_order: of a `BlockPlan`.
        scale: multiplies the scores.
        gather_kv: read keys and values through `kv_order` instead of copying them in order first.

    Returns:
        `[B, H, n_q, D]` in the dtype and memory layout of q, and the log-sum-exp `[B, H, n_q]` float32. The latter is
        always written: it is 4 bytes a row, and the backward pass needs it.
    """
    out, lse = _results(q)
    q = rows_contiguous(q)
    plan = BlockPlan(q.shape[2], k.shape[2], tile_start, tile_len, run_start, run_len)
    tiles = choose_tiles(FORWARD_TILES, q, tile_len)
    walk = make_walk(plan, tiles.block_m, tiles.block_n)
    k, v, kv_order = keys_in_order(k, v, kv_order, gather_kv)
    pieces = walk.piece_len.shape[-1]
    with on_device(q):
        _forward_kernel[(pieces * q.shape[0] * q.shape[1],)](
            q, k, v, out, lse,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *order_args(q_order), *order_args(kv_order), *walk,
            *plan_strides(tile_len.shape), q.shape[1], plan.n_q, pieces, tile_len.shape[-1],
            walk.full_start.shape[-1], scale * LOG2E,
            D=q.shape[3], D_PAD=padded(q.shape[3]), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            Q_ORDERED=q_order is not None, GATHER_KV=kv_order is not None,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out, lse


@block_sparse_attention.register_fake
def _(q, k, v, tile_start, tile_len, run_start, run_len, q_order, kv_order, scale, gather_kv=False):
    return _results(q)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.gather_kv = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out: torch.Tensor, grad_lse: torch.Tensor):
    from .block_sparse_backward import block_sparse_attention_backward

    grads = block_sparse_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.gather_kv)
    return *grads, *[None] * 8


block_sparse_attention.register_autograd(_backward, setup_context=_save)
