"""A `BlockPlan` as FlexAttention's `BlockMask`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .plan import BlockPlan
from .runs import FEW_RUNS, count_below

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def to_block_mask(plan: BlockPlan, block_size: int | tuple[int, int] = 128) -> BlockMask:
    """FlexAttention's `BlockMask` of a plan over the *permuted* sequences; made once per plan and block size."""
    key = (block_size, block_size) if isinstance(block_size, int) else block_size
    if key not in plan._block_masks:
        plan._block_masks[key] = build_block_mask(plan, key)
    return plan._block_masks[key]


def build_block_mask(plan: BlockPlan, block_size: tuple[int, int]) -> BlockMask:
    """Build the `BlockMask` of a plan over its permuted queries and keys, without an `n_q x n_kv` tensor.

    Blocks that the plan covers wholly are marked full (no mask is evaluated there); the others look up the tile of a
    query and whether that tile reads a key.

    Args:
        plan: the plan; the mask applies to q in `q_order` and to k and v in `kv_order`.
        block_size: FlexAttention's block, `(queries, keys)`.

    Returns:
        A `BlockMask` of batch `Bp` and heads `Hp` (1 broadcasts).
    """
    from torch.nn.attention.flex_attention import BlockMask

    block_q, block_k = block_size
    q_edges = _edges(plan.n_q, block_q, plan.device)
    k_edges = _edges(plan.n_kv, block_k, plan.device)
    # pairs[qb, kb] = sum over tiles of (rows of the tile in qb) * (keys it reads in kb)
    rows = _overlap(plan.tile_start, plan.tile_len, q_edges)
    pairs = rows.transpose(-1, -2) @ _keys_per_block(plan, k_edges)
    area = q_edges.diff().double().unsqueeze(-1) * k_edges.diff().double()
    full = pairs == area
    partial = (pairs > 0) & ~full
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=block_size,
        mask_mod=_mask_mod(plan),
        seq_lengths=(plan.n_q, plan.n_kv),
    )


def _keys_per_block(plan: BlockPlan, edges: torch.Tensor) -> torch.Tensor:
    """Keys that each tile reads in each block of keys, `[Bp, Hp, T, nk]` float64."""
    if plan.selection is None:
        return count_below(plan.run_start, plan.run_len, edges).diff(dim=-1).double()
    selected, sizes = plan.selection
    return selected.double() @ _overlap(sizes.cumsum(-1) - sizes, sizes, edges)


def _overlap(start: torch.Tensor, length: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Tokens that each interval `[..., C]` has in each block, `[..., C, blocks]` float64 (exact, and has a matmul)."""
    return count_below(start.unsqueeze(-1), length.unsqueeze(-1), edges).diff(dim=-1).double()


def _mask_mod(plan: BlockPlan) -> Callable[..., torch.Tensor]:
    """Whether a query reads a key, from tables of the size of the sequence, never of its square."""
    tile_of_query = plan.tile_of_query().int()
    one_batch, one_head = plan.tile_start.shape[0] == 1, plan.tile_start.shape[1] == 1

    def place(b, h):
        return b * 0 if one_batch else b, h * 0 if one_head else h

    if plan.selection is not None:
        selected, sizes = plan.selection
        positions = torch.arange(plan.n_kv, device=plan.device).expand(*sizes.shape[:2], -1).contiguous()
        cluster_of_key = torch.searchsorted(sizes.cumsum(-1), positions, right=True).int()

        def mask_mod(b, h, q_idx, kv_idx):
            b, h = place(b, h)
            return selected[b, h, tile_of_query[b, h, q_idx], cluster_of_key[b, h, kv_idx]]

    elif plan.run_start.shape[-1] <= FEW_RUNS:
        starts, ends = plan.run_start, plan.run_start + plan.run_len
        runs = range(plan.run_start.shape[-1])

        def mask_mod(b, h, q_idx, kv_idx):
            b, h = place(b, h)
            tile = tile_of_query[b, h, q_idx]
            inside = [(kv_idx >= starts[b, h, tile, r]) & (kv_idx < ends[b, h, tile, r]) for r in runs]
            return functools.reduce(operator.or_, inside)

    else:
        keys_of_tile = plan.keys_of_tile()

        def mask_mod(b, h, q_idx, kv_idx):
            b, h = place(b, h)
            return keys_of_tile[b, h, tile_of_query[b, h, q_idx], kv_idx]

    return mask_mod


def _edges(length: int, block: int, device: torch.device) -> torch.Tensor:
    """Block boundaries `0, block, 2 * block, ..., length`."""
    edges = torch.arange(0, length + block, block, device=device)
    return edges.clamp(max=length)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts `[..., nq]` and indices `[..., nq, nk]` of the marked blocks, marked ones first."""
    indices = torch.argsort((~blocks).to(torch.int8), dim=-1, stable=True)
    return blocks.sum(-1).int(), indices.int().contiguous()
