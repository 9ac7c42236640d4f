"""What every kernel here is launched with: tile sizes, strides, orders, the device."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton

from ..groups import repeat_heads

LOG2E = math.log2(math.e)
# Products and sums as one instruction, said at every launch: kernels count on it in their loops, and Triton 3.10 leaves
# it out unless it is asked for (3.9 warns of that).
FUSED = {"enable_fp_fusion": True}


class Tiles(NamedTuple):
    """A launch configuration.

    Args:
        block_m, block_n: queries and keys per tile.
        num_warps: per program.
        num_stages: of the load pipeline.
        tail: keys of a tile at the end of a run; `block_n` when 0.
        described: keys and values come through tensor descriptors, where their memory can be described.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tail: int = 0
    described: bool = False

    @property
    def tail_n(self) -> int:
        """Keys of a tile at the end of a run."""
        return self.tail or self.block_n


def choose_tiles(table: dict[tuple[int, int, int], Tiles], q: torch.Tensor, tile_len: torch.Tensor) -> Tiles:
    """The entry of a table for the device, head_dim and dtype of `q [B, H, N, D]`.

    Where the plan's tiles, `tile_len [Bp, Hp, T]`, have fewer than `BLOCK_M` queries on average, rows of a program
    would idle, so `BLOCK_M` is halved down to that mean, and 8 warps become the 4 that work on 64 rows. Reads shapes
    only.
    """
    major = major_of(q)
    width = max(64, padded(q.shape[-1]))
    tiles = table.get((major, width, q.element_size())) or table[0, width, q.element_size()]
    block_m = min(tiles.block_m, padded(-(-q.shape[2] // tile_len.shape[-1])))
    return tiles._replace(block_m=block_m, num_warps=4 if block_m <= 64 < tiles.block_m else tiles.num_warps)


def major_of(x: torch.Tensor) -> int:
    """The major compute capability of an NVIDIA GPU that holds `x`, and 0 of anything else."""
    # An AMD GPU has numbers of its own: 9.4 is none that has Hopper's copy engine or shared memory.
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda and torch.version.hip is None else 0


def padded(size: int) -> int:
    """The next power of two, at least the 16 that a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """`x [..., D]` with its head dimension side by side in memory, as the kernels read it; a view where it can be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def order_args(order: torch.Tensor | None, heads: int) -> tuple[torch.Tensor | None, int, int]:
    """An order `[1|B, 1|G|H, N]` for each of H heads, and its strides for batch and head, 0 where it is broadcast."""
    if order is None:
        return None, 0, 0
    order = rows_contiguous(order if order.shape[1] == 1 else repeat_heads(order, heads))
    batch, head = (order.stride(i) if order.shape[i] > 1 else 0 for i in (0, 1))
    return order, batch, head


def heads_in_order(x: torch.Tensor, order: torch.Tensor | None) -> int:
    """How many heads `x [B, Hkv, N, D]` has in an order `[1|B, 1|G|H, N]`, in which it is repeated for more heads."""
    return x.shape[1] if order is None else max(x.shape[1], order.shape[1])


def plan_strides(lead: torch.Size) -> tuple[int, int]:
    """How many plan entries lie between neighbouring batch entries and heads, for `lead = (Bp, Hp)`."""
    return lead[1] if lead[0] > 1 else 0, 1 if lead[1] > 1 else 0


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it that of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
