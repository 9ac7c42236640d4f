"""How a kernel walks the keys of a query tile: the plan cut to pieces and tiles, and the device code that does it.

How runs become tiles of `BLOCK_N` keys: each run is cut, from its own first key, into whole tiles, and what is left of
it into tails of at most `TAIL_N` keys. The program walks all whole tiles first, without any mask, then all tails, each
masked. Softmax does not care about the order, and both walks are flat loops, so that the loads of the next tile can be
under way while this one is computed. Runs start anywhere: a tile is loaded row by row, and a row lies where it lies.

What that costs: a tail takes as long as `TAIL_N` keys. With runs of mean length L, about `TAIL_N / (2 * L)` more pairs
are computed than the plan names: 11 % for runs of 150 keys and tails of 32, nothing for plans of aligned blocks.
Packing the tails of several runs into one tile would save most of it, but needs a list of key positions per tile (4
bytes for every tail key of every query tile) and a gather in place of contiguous rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..gradients import normal_tensors
from ..plan import BlockPlan
from .launch import FUSED, Tiles, on_device
from .runs import cut_runs

PIECES = 256  # at a time
STREAMS = 4  # that a plan keeps walks for


class Walk(NamedTuple):
    """What a query piece reads, on the device, with shapes that depend on no value. `P` pieces, `R` runs.

    Args:
        piece_start, piece_len, piece_tile: `[Bp, Hp, P]` int32; first permuted query, queries (0 is padding), tile;
            the pieces with most keys first, so that what remains at the end of a head is short.
        full_start, full_tiles: `[Bp, Hp, T, R + 1]` int32; of the runs with a whole tile: first key, whole tiles.
        full_count: `[Bp, Hp, T]` int32, whole tiles of all runs together.
        tail_start, tail_len: `[Bp, Hp, T, S + 1]` int32, S a multiple of R; of the tails: first key, keys.
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


def make_walk(plan: BlockPlan, block_m: int, block_n: int, tail_n: int) -> Walk:
    """Cut a plan to pieces of `block_m` queries and its runs to tiles of `block_n` keys; no host sync.

    What is left of a run makes tails of at most `tail_n` keys, a divisor of `block_n`.
    """
    full_start, full_tiles, full_count, tail_start, tail_len, tail_count = cut_runs(
        plan.run_start, plan.run_len, block_n, tail_n
    )
    start, length, tile = plan.cut(block_m)
    pieces = [start, length, tile]
    work, *ordered = (torch.empty_like(tile) for _ in range(4))
    grid, (tiles, count) = (tile[..., 0].numel(),), (full_count.shape[-1], tile.shape[-1])
    with on_device(tile):
        _work_kernel[grid](full_count, tail_count, length, tile, work, tiles, count, BLOCK=PIECES, **FUSED, num_warps=4)
        order = work.argsort(dim=-1, descending=True, stable=True)  # equals in sequence share keys in the L2 cache
        _reorder_kernel[grid](order, *pieces, *ordered, count, BLOCK=PIECES, **FUSED, num_warps=4)
    start, length, tile = ordered
    return Walk(start, length, tile, full_start, full_tiles, full_count, tail_start, tail_len, tail_count)


def kept_on(plan: BlockPlan, key: tuple, make: Callable[[], Iterable[torch.Tensor]]) -> list[torch.Tensor]:
    """What `make` makes of a plan, once for each stream, and kept on the plan for the last few of them.

    Another stream has nothing to wait for that says when it is filled. While a CUDA graph is captured nothing is: then
    it is of the graph alone, and not kept.
    """
    stream = stream_of(plan.device)
    if stream is None:
        return list(make())
    kept = plan._walks.setdefault(key, {})
    if stream not in kept:
        if len(kept) == STREAMS:
            del kept[next(iter(kept))]  # torch gives its memory to what comes later on that stream
        with normal_tensors():  # a backward pass may be the next that reads it
            kept[stream] = list(make())
    return kept[stream]


def stream_of(device: torch.device) -> int | None:
    """The current stream of a device; None while it is captured."""
    if device.type != "cuda":
        return 0
    with torch.cuda.device(device):
        return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream().cuda_stream


def walk_of_plan(plan: BlockPlan, tiles: Tiles) -> list[torch.Tensor]:
    """The walk of a plan in such tiles, made once and kept on the plan."""
    key = (tiles.block_m, tiles.block_n, tiles.tail_n)
    return kept_on(plan, key, lambda: make_walk(plan, *key))


# -- device code -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tiles", "pieces"])
def _work_kernel(full_count_ptr, tail_count_ptr, length_ptr, tile_ptr, work_ptr, tiles, pieces, BLOCK: tl.constexpr):
    """The tiles of keys that each piece reads; -1 of padding."""
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, pieces, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < pieces
        tile = row * tiles + tl.load(tile_ptr + row * pieces + at, mask=inside, other=0)
        work = tl.load(full_count_ptr + tile, mask=inside, other=0) + tl.load(
            tail_count_ptr + tile, mask=inside, other=0
        )
        length = tl.load(length_ptr + row * pieces + at, mask=inside, other=0)
        tl.store(work_ptr + row * pieces + at, tl.where(length > 0, work, -1), mask=inside)


@triton.jit(do_not_specialize=["pieces"])
def _reorder_kernel(
    order_ptr, start_ptr, length_ptr, tile_ptr, new_start_ptr, new_length_ptr, new_tile_ptr, pieces, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * pieces
    for first in range(0, pieces, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < pieces
        old = row + tl.load(order_ptr + row + at, mask=inside, other=0)
        tl.store(new_start_ptr + row + at, tl.load(start_ptr + old, mask=inside), mask=inside)
        tl.store(new_length_ptr + row + at, tl.load(length_ptr + old, mask=inside), mask=inside)
        tl.store(new_tile_ptr + row + at, tl.load(tile_ptr + old, mask=inside), mask=inside)


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
def find_piece(piece_start_ptr, piece_len_ptr, piece_tile_ptr, plan_sb, plan_sh, heads, pieces, tiles):
    """The piece of this program: `(b, h, start, size, tile)`; `tile` counts over all plan entries, size 0 is no work.

    The programs of a head lie side by side: those that run at a time share its keys in the L2 cache.
    """
    head = (tl.program_id(0) // pieces).to(tl.int64)
    b = head // heads
    h = head % heads
    entry = b * plan_sb + h * plan_sh
    at = entry * pieces + tl.program_id(0) % pieces
    tile = entry * tiles + tl.load(piece_tile_ptr + at)
    return b, h, tl.load(piece_start_ptr + at), tl.load(piece_len_ptr + at), tile


@triton.jit
def _next_full_tile(start_ptr, tiles_ptr, slot, key, left, BLOCK_N: tl.constexpr):
    """One whole tile on: within the run, or to the run in the next slot."""
    done = left == 1
    slot += done.to(tl.int64)
    key = tl.where(done, tl.load(start_ptr + slot), key + BLOCK_N)
    left = tl.where(done, tl.load(tiles_ptr + slot), left - 1)
    return slot, key, left


@triton.jit
def walk_keys(
    STEP: tl.constexpr, state, inputs, tile, slots, tail_slots, kv_order_ptr,
    full_start_ptr, full_tiles_ptr, full_count_ptr, tail_start_ptr, tail_len_ptr, tail_count_ptr,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, GATHER_KV: tl.constexpr,
):  # fmt: skip
    """`state = STEP(state, inputs, first, keys, rows, inside, D, D_PAD, MASKED)` for each tile of keys of `tile`.

    `first` is the first key, `keys` are permuted positions, `rows` the tokens there when GATHER_KV (else the same),
    `inside` which of them count (all, unless MASKED). `state` and `inputs` are tuples.
    """
    offs_n = tl.arange(0, BLOCK_N)
    slot = tile * slots
    key = tl.load(full_start_ptr + slot)
    left = tl.load(full_tiles_ptr + slot)
    for _ in range(tl.load(full_count_ptr + tile)):
        keys = key + offs_n
        inside = offs_n < BLOCK_N
        rows = token_rows(kv_order_ptr, keys, inside, GATHER_KV, False)
        state = STEP(state, inputs, key, keys, rows, inside, D, D_PAD, False)
        slot, key, left = _next_full_tile(full_start_ptr, full_tiles_ptr, slot, key, left, BLOCK_N)

    offs_n = tl.arange(0, TAIL_N)
    slot = tile * tail_slots
    for i in range(tl.load(tail_count_ptr + tile)):
        key = tl.load(tail_start_ptr + slot + i)
        keys = key + offs_n
        inside = offs_n < tl.load(tail_len_ptr + slot + i)
        rows = token_rows(kv_order_ptr, keys, inside, GATHER_KV, True)
        state = STEP(state, inputs, key, keys, rows, inside, D, D_PAD, True)
    return state
