"""Runs of keys on the GPU: the arithmetic of `attention/runs.py` and of the walk in one pass each.

In torch each is a dozen operators over 64-bit numbers, one for every pair of clusters of every head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FUSED, on_device

BLOCK = 256  # entries of a row at a time


def merge_segments(selected: torch.Tensor, sizes: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`runs.merge_segments` into a given number of run slots, which must suffice: further runs are left out.

    Args:
        selected: `[B, H, T, C]` bool.
        sizes: `[B, H, C]` integer.
        slots: R.
    """
    lead, rows, segments = selected.shape[:-2], selected.shape[-2], selected.shape[-1]
    sizes = sizes.expand(*lead, segments).contiguous()
    of_segments, of_runs = (*lead, segments), (*lead, rows, slots)
    filled = [torch.empty(of_segments, dtype=torch.int32, device=selected.device) for _ in range(3)]
    start, length = (torch.empty(of_runs, dtype=torch.int32, device=selected.device) for _ in range(2))
    with on_device(selected):
        # The empty ones last: they part nothing.
        _filled_kernel[(sizes[..., 0].numel(),)](sizes, *filled, segments, BLOCK=BLOCK, **FUSED, num_warps=4)
        _merge_kernel[(start[..., 0].numel(),)](
            selected.contiguous().view(torch.int8), *filled, start, length, rows, segments, slots,
            BLOCK=BLOCK, **FUSED, num_warps=4,
        )  # fmt: skip
    return start, length


def starts_of(sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`runs.starts_of` in one pass."""
    sizes = sizes.contiguous()
    start, length = (torch.empty(sizes.shape, dtype=torch.int32, device=sizes.device) for _ in range(2))
    with on_device(sizes):
        _starts_kernel[(sizes[..., 0].numel(),)](
            sizes, start, length, sizes.shape[-1], BLOCK=BLOCK, **FUSED, num_warps=4
        )
    return start, length


def cut_runs(
    run_start: torch.Tensor, run_len: torch.Tensor, block_n: int, tail_n: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs `[..., T, R]` as whole tiles of `block_n` keys and as tails of at most `tail_n`, a divisor of it.

    Returns:
        `(full_start, full_tiles, full_count, tail_start, tail_len, tail_count)` as `walk.Walk` describes them.
    """
    *lead, slots = run_start.shape
    tails = slots * (block_n // tail_n)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*lead, *shape, dtype=torch.int32, device=run_start.device)

    made = empty(slots + 1), empty(slots + 1), empty(), empty(tails + 1), empty(tails + 1), empty()
    with on_device(run_start):
        _cut_kernel[(run_start[..., 0].numel(),)](
            run_start.contiguous(), run_len.contiguous(), *made, slots, tails,
            BLOCK_N=block_n, TAIL_N=tail_n, BLOCK=min(BLOCK, triton.next_power_of_2(slots)), **FUSED, num_warps=4,
        )  # fmt: skip
    return made


def cut_segments(
    start: torch.Tensor, length: torch.Tensor, total: int, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`runs.cut_segments` in one pass."""
    pieces, lengths, segment, _ = _cut(start.contiguous(), length, total, most)
    return pieces, lengths, segment


def cut_clusters(sizes: torch.Tensor, total: int, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut clusters that lie one behind the other, `[..., C]` integer, to pieces of at most `most` members.

    Returns:
        `(start, length, first)`: the pieces as of `cut_segments`, and the first piece of each cluster `[..., C]` int32.
    """
    start, length, _, first = _cut(None, sizes, total, most)
    return start, length, first


def _cut(start: torch.Tensor | None, length: torch.Tensor, total: int, most: int) -> tuple[torch.Tensor, ...]:
    *lead, segments = length.shape
    slots = total // most + segments
    *made, first = (
        torch.empty(*lead, size, dtype=torch.int32, device=length.device) for size in (slots, slots, slots, segments)
    )
    with on_device(length):
        _pieces_kernel[(first[..., 0].numel(),)](
            start, length.contiguous(), *made, first, segments, slots, total, most,
            GIVEN=start is not None, BLOCK=BLOCK, **FUSED, num_warps=4,
        )  # fmt: skip
    return *made, first


@triton.jit(do_not_specialize=["segments", "slots", "total", "most"])
def _pieces_kernel(
    start_ptr, length_ptr, piece_start_ptr, piece_len_ptr, segment_ptr, first_ptr, segments, slots, total, most,
    GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`GIVEN`: where segments start; else each starts where the one before ends."""
    row = tl.program_id(0).to(tl.int64)
    if GIVEN:
        start_ptr += row * segments
    length_ptr += row * segments
    first_ptr += row * segments
    piece_start_ptr += row * slots
    piece_len_ptr += row * slots
    segment_ptr += row * slots
    used = 0
    passed = 0
    for block in range(0, segments, BLOCK):
        at = block + tl.arange(0, BLOCK)
        left = tl.load(length_ptr + at, mask=at < segments, other=0).to(tl.int32)
        if GIVEN:
            start = tl.load(start_ptr + at, mask=at < segments, other=0).to(tl.int32)
        else:
            start = passed + tl.cumsum(left, 0) - left
            passed += tl.sum(left, 0)
        pieces = tl.cdiv(left, most)
        place = used + tl.cumsum(pieces, 0) - pieces
        tl.store(first_ptr + at, place, mask=at < segments)
        used += tl.sum(pieces, 0)
        for _ in range(tl.max(pieces, 0)):
            some = left > 0
            tl.store(piece_start_ptr + place, start, mask=some)
            tl.store(piece_len_ptr + place, tl.minimum(left, most), mask=some)
            tl.store(segment_ptr + place, at, mask=some)
            place += 1
            start += most
            left -= most
    for block in range(used, slots, BLOCK):
        at = block + tl.arange(0, BLOCK)
        tl.store(piece_start_ptr + at, tl.full([BLOCK], 0, tl.int32) + total, mask=at < slots)
        tl.store(piece_len_ptr + at, tl.zeros([BLOCK], tl.int32), mask=at < slots)
        tl.store(segment_ptr + at, tl.zeros([BLOCK], tl.int32) + segments - 1, mask=at < slots)


@triton.jit(do_not_specialize=["segments"])
def _starts_kernel(size_ptr, start_ptr, length_ptr, segments, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    passed = 0
    for first in range(0, segments, BLOCK):
        at = first + tl.arange(0, BLOCK)
        size = tl.load(size_ptr + row * segments + at, mask=at < segments, other=0).to(tl.int32)
        tl.store(start_ptr + row * segments + at, passed + tl.cumsum(size, 0) - size, mask=at < segments)
        tl.store(length_ptr + row * segments + at, size, mask=at < segments)
        passed += tl.sum(size, 0)


@triton.jit(do_not_specialize=["segments"])
def _filled_kernel(size_ptr, order_ptr, start_ptr, filled_ptr, segments, BLOCK: tl.constexpr):
    """The segments that are not empty, in order: number, start and size; behind them zeros."""
    row = tl.program_id(0).to(tl.int64) * segments
    passed = 0
    count = 0
    for first in range(0, segments, BLOCK):
        at = first + tl.arange(0, BLOCK)
        size = tl.load(size_ptr + row + at, mask=at < segments, other=0).to(tl.int32)
        some = (size > 0).to(tl.int32)
        place = row + count + tl.cumsum(some, 0) - 1
        tl.store(order_ptr + place, at, mask=some != 0)
        tl.store(start_ptr + place, passed + tl.cumsum(size, 0) - size, mask=some != 0)
        tl.store(filled_ptr + place, size, mask=some != 0)
        passed += tl.sum(size, 0)
        count += tl.sum(some, 0)
    for first in range(count, segments, BLOCK):
        at = first + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], tl.int32)
        tl.store(order_ptr + row + at, zeros, mask=at < segments)
        tl.store(start_ptr + row + at, zeros, mask=at < segments)
        tl.store(filled_ptr + row + at, zeros, mask=at < segments)


@triton.jit(do_not_specialize=["rows", "segments", "slots"])
def _merge_kernel(
    selected_ptr, order_ptr, start_ptr, size_ptr, run_start_ptr, run_len_ptr, rows, segments, slots,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The runs of one tile, from segments of which the empty ones are last."""
    row = tl.program_id(0).to(tl.int64)
    selected_ptr += row * segments
    order_ptr += (row // rows) * segments
    start_ptr += (row // rows) * segments
    size_ptr += (row // rows) * segments
    runs = 0
    for first in range(0, segments, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < segments
        size = tl.load(size_ptr + at, mask=inside, other=0)
        start = tl.load(start_ptr + at, mask=inside, other=0)
        chosen = (tl.load(selected_ptr + tl.load(order_ptr + at, mask=inside, other=0), mask=inside, other=0) != 0) & (
            size > 0
        )
        has_before = inside & (at > 0)
        before = tl.load(order_ptr + at - 1, mask=has_before, other=0)
        joined = tl.load(selected_ptr + before, mask=has_before, other=0) != 0
        has_after = at + 1 < segments
        after = tl.load(order_ptr + at + 1, mask=has_after, other=0)
        goes_on = (tl.load(selected_ptr + after, mask=has_after, other=0) != 0) & (
            tl.load(size_ptr + at + 1, mask=has_after, other=0) > 0
        )
        begins = (chosen & (joined == 0)).to(tl.int32)
        place = runs + tl.cumsum(begins, 0) - 1
        room = place < slots
        tl.store(run_start_ptr + row * slots + place, start, mask=(begins != 0) & room)
        tl.store(run_len_ptr + row * slots + place, start + size, mask=chosen & (goes_on == 0) & room)
        runs += tl.sum(begins, 0)
    # Ends to lengths, once all are there; the slots that are left over get 0.
    tl.debug_barrier()
    for first in range(0, slots, BLOCK):
        at = first + tl.arange(0, BLOCK)
        used = at < tl.minimum(runs, slots)
        start = tl.load(run_start_ptr + row * slots + at, mask=used, other=0)
        end = tl.load(run_len_ptr + row * slots + at, mask=used, other=0)
        tl.store(run_start_ptr + row * slots + at, start, mask=at < slots)
        tl.store(run_len_ptr + row * slots + at, end - start, mask=at < slots)


@triton.jit(do_not_specialize=["slots", "tails"])
def _cut_kernel(
    run_start_ptr, run_len_ptr, full_start_ptr, full_tiles_ptr, full_count_ptr,
    tail_start_ptr, tail_len_ptr, tail_count_ptr, slots, tails,
    BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile: its runs with whole tiles to the front of one list, its tails to the front of another.

    The entry behind the last one is zero, since a walk looks one entry ahead.
    """
    row = tl.program_id(0).to(tl.int64)
    full_start_ptr += row * (slots + 1)
    full_tiles_ptr += row * (slots + 1)
    tail_start_ptr += row * (tails + 1)
    tail_len_ptr += row * (tails + 1)
    fulls = 0
    whole = 0
    parts = 0
    for first in range(0, slots, BLOCK):
        at = first + tl.arange(0, BLOCK)
        start = tl.load(run_start_ptr + row * slots + at, mask=at < slots, other=0)
        length = tl.load(run_len_ptr + row * slots + at, mask=at < slots, other=0)
        tiles = length // BLOCK_N
        some = (tiles > 0).to(tl.int32)
        place = fulls + tl.cumsum(some, 0) - 1
        tl.store(full_start_ptr + place, start, mask=some != 0)
        tl.store(full_tiles_ptr + place, tiles, mask=some != 0)
        fulls += tl.sum(some, 0)
        whole += tl.sum(tiles, 0)
        for skip in tl.static_range(0, BLOCK_N, TAIL_N):
            left = tl.minimum(tl.maximum(length - tiles * BLOCK_N - skip, 0), TAIL_N)
            some = (left > 0).to(tl.int32)
            place = parts + tl.cumsum(some, 0) - 1
            tl.store(tail_start_ptr + place, start + tiles * BLOCK_N + skip, mask=some != 0)
            tl.store(tail_len_ptr + place, left, mask=some != 0)
            parts += tl.sum(some, 0)
    tl.store(full_start_ptr + fulls, 0)
    tl.store(full_tiles_ptr + fulls, 0)
    tl.store(tail_start_ptr + parts, 0)
    tl.store(tail_len_ptr + parts, 0)
    tl.store(full_count_ptr + row, whole)
    tl.store(tail_count_ptr + row, parts)
