"""A plan seen from its blocks of keys: which tiles read each of them, for the kernel that makes dK and dV.

The tables are quadratic in the length of the sequence, so they are made for some heads at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..plan import BlockPlan
from .launch import FUSED, Tiles, on_device
from .walk import kept_on

CHUNK = 64  # words a program of _key_bits_kernel
READ_CHUNK = 256  # tiles at a time in _readers_kernel
READERS_BYTES = 2**26  # of the tables for some heads at a time: at 118,800 tokens one head's take 17 MB


@triton.jit
def _low_bits(count):
    """An int64 with the lowest `count` bits set, 0 to 64."""
    one = tl.full(count.shape, 1, tl.int64)
    # A shift by 64 is undefined, and by 63 followed by minus one it would overflow.
    return tl.where(count >= 64, -one, (one << tl.minimum(count, 62)) * tl.where(count == 63, 2, 1) - 1)


@triton.jit(do_not_specialize=["blocks", "slots"])
def _key_bits_kernel(
    run_start_ptr, run_len_ptr, bits_ptr, blocks, slots, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    chunks = tl.cdiv(blocks, CHUNK)
    tile = (tl.program_id(0) // chunks).to(tl.int64)
    block = (tl.program_id(0) % chunks) * CHUNK + tl.arange(0, CHUNK)
    first = block * BLOCK_N
    bits = tl.zeros([CHUNK], tl.int64)
    for slot in range(slots):
        start = tl.load(run_start_ptr + tile * slots + slot) - first
        end = start + tl.load(run_len_ptr + tile * slots + slot)
        low = tl.minimum(tl.maximum(start, 0), BLOCK_N).to(tl.int64)
        high = tl.minimum(tl.maximum(end, 0), BLOCK_N).to(tl.int64)
        bits = bits | (_low_bits(high) & ~_low_bits(low))
    tl.store(bits_ptr + tile * blocks + block, bits, mask=block < blocks)


@triton.jit(do_not_specialize=["tiles", "blocks"])
def _readers_kernel(
    bits_ptr, tile_len_ptr, readers_ptr, steps_ptr, tiles, blocks,
    WORDS: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One block of keys: the tiles that read any of them, in their order, and their pieces."""
    place = tl.program_id(0).to(tl.int64)
    entry = place // blocks
    tile_len_ptr += entry * tiles
    bits_ptr += (entry * tiles * blocks + place % blocks) * WORDS
    readers_ptr += place * (tiles + 1)
    count = 0
    steps = 0
    for first in range(0, tiles, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        inside = tile < tiles
        at = bits_ptr + tile.to(tl.int64) * blocks * WORDS
        bits = tl.load(at, mask=inside, other=0)
        for word in tl.static_range(1, WORDS):
            bits = bits | tl.load(at + word, mask=inside, other=0)
        size = tl.load(tile_len_ptr + tile, mask=inside, other=0)
        reads = (bits != 0) & (size > 0)
        one = reads.to(tl.int32)
        tl.store(readers_ptr + count + tl.cumsum(one, 0) - 1, tile, mask=reads)
        count += tl.sum(one, 0)
        steps += tl.sum(tl.where(reads, tl.cdiv(size, BLOCK_M), 0), 0)
    tl.store(readers_ptr + count, 0)  # the walk looks one entry ahead
    tl.store(steps_ptr + place, steps)


class Readers(NamedTuple):
    """Some entries of a plan seen from its key blocks, on the device: E entries, K blocks of `BLOCK_N` permuted keys.

    Args:
        tile_start, tile_len: `[E, T]` int32, of the plan.
        bits: `[E, T, K, W]` int64; bit n of word w says that the tile reads key 64 w + n of the block.
        block: `[E, K]` int32, the blocks, those with most work first.
        readers: `[E, K, T + 1]` int32, the tiles that read any key of the block, then a 0, then whatever.
        steps: `[E, K]` int32, pieces of `BLOCK_M` queries of all these tiles together.
    """

    tile_start: torch.Tensor
    tile_len: torch.Tensor
    bits: torch.Tensor
    block: torch.Tensor
    readers: torch.Tensor
    steps: torch.Tensor


def words_of(block_n: int) -> int:
    """Words of 64 bits, one bit a key."""
    return max(1, block_n // 64)


def _bytes_of_entry(plan: BlockPlan, block_n: int) -> int:
    blocks, tiles = -(-plan.n_kv // block_n), plan.tile_len.shape[-1]
    return blocks * (8 * tiles * words_of(block_n) + 4 * (tiles + 1))


def make_readers(plan: BlockPlan, block_m: int, block_n: int, entries: slice = slice(None)) -> Readers:
    """Transpose some entries of a plan, counted over batch and heads, for blocks of `block_n` keys, at most 128; no
    host sync."""
    tile_start, tile_len, run_start, run_len = (
        x.flatten(0, 1)[entries].contiguous() for x in (plan.tile_start, plan.tile_len, plan.run_start, plan.run_len)
    )
    count, tiles = tile_len.shape
    blocks, words = -(-plan.n_kv // block_n), words_of(block_n)
    bits = torch.empty(count, tiles, blocks, words, dtype=torch.int64, device=plan.device)
    readers = torch.empty(count, blocks, tiles + 1, dtype=torch.int32, device=plan.device)
    steps = torch.empty(count, blocks, dtype=torch.int32, device=plan.device)
    with on_device(bits):
        _key_bits_kernel[(tile_len.numel() * triton.cdiv(blocks * words, CHUNK),)](
            run_start, run_len, bits, blocks * words, run_len.shape[-1], BLOCK_N=block_n // words, CHUNK=CHUNK, **FUSED
        )
        _readers_kernel[(steps.numel(),)](
            bits, tile_len, readers, steps, tiles, blocks,
            WORDS=words, BLOCK_M=block_m, CHUNK=READ_CHUNK, **FUSED, num_warps=4,
        )  # fmt: skip
    block = steps.argsort(-1, descending=True).int().contiguous()
    return Readers(tile_start, tile_len, bits, block, readers, steps)


def readers_of(plan: BlockPlan, tiles: Tiles) -> list[torch.Tensor]:
    """The tables of a plan that is one for all heads, made once and kept on it; empty for others, and for large ones.

    Such a plan serves many layers and steps. Those of others serve one call, and would lie in memory until its backward
    pass.
    """
    if plan.tile_len.shape[:2] != (1, 1) or _bytes_of_entry(plan, tiles.block_n) > READERS_BYTES:
        return []
    key = ("readers", tiles.block_m, tiles.block_n)
    return kept_on(plan, key, lambda: make_readers(plan, tiles.block_m, tiles.block_n))


def tables_of(
    plan: BlockPlan, tiles: Tiles, known: Sequence[torch.Tensor], batch: int, heads: int
) -> Iterator[tuple[int, Readers, list[tuple[int, int]]]]:
    """The tables of some entries of a plan at a time: the first entry, its tables, and the heads that they are of, as
    ranges of numbers over all batch entries."""
    of_batch, of_heads = plan.tile_len.shape[:2]
    step = max(1, READERS_BYTES // _bytes_of_entry(plan, tiles.block_n))
    for first in range(0, of_batch * of_heads, step):
        last = min(first + step, of_batch * of_heads)
        readers = Readers(*known) if known else make_readers(plan, tiles.block_m, tiles.block_n, slice(first, last))
        if of_heads == 1:  # an entry for all heads, of one batch entry or of all
            width = heads if of_batch > 1 else batch * heads
            ranges = [(first * width, last * width)]
        elif of_batch == 1:
            ranges = [(b * heads + first, b * heads + last) for b in range(batch)]
        else:
            ranges = [(first, last)]
        yield first, readers, ranges
