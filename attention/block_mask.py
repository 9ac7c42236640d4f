"""A `BlockPlan` as FlexAttention's `BlockMask`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .runs import count_below

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .plan import BlockPlan


def build_block_mask(plan: BlockPlan, block_size: tuple[int, int]) -> BlockMask:
    """Build the `BlockMask` of a plan over its permuted queries and keys, without an `n_q x n_kv` tensor.

    Blocks that the plan covers wholly are marked full (no mask is evaluated there); the others look up which tile a
    query belongs to and which keys that tile reads.

    Args:
        plan: the plan; `q[..., q_order]` and `k[..., kv_order]` are what the mask applies to.
        block_size: FlexAttention's block, `(queries, keys)`.

    Returns:
        A `BlockMask` of batch `Bp` and heads `Hp` (1 broadcasts).
    """
    from torch.nn.attention.flex_attention import BlockMask

    block_q, block_k = block_size
    device = plan.device
    q_edges = _edges(plan.n_q, block_q, device)
    k_edges = _edges(plan.n_kv, block_k, device)

    # pairs[qb, kb] = sum over tiles of (rows of the tile in qb) * (keys it reads in kb)
    keys = count_below(plan.run_start, plan.run_len, k_edges).diff(dim=-1)
    rows = count_below(plan.tile_start.unsqueeze(-1), plan.tile_len.unsqueeze(-1), q_edges).diff(dim=-1)
    pairs = rows.double().transpose(-1, -2) @ keys.double()
    area = q_edges.diff().double().unsqueeze(-1) * k_edges.diff().double()
    full = pairs == area
    partial = (pairs > 0) & ~full

    tile_of_query = plan.tile_of_query().int()
    keys_of_tile = plan.keys_of_tile()
    one_batch, one_head = keys_of_tile.shape[0] == 1, keys_of_tile.shape[1] == 1

    def mask_mod(b, h, q_idx, kv_idx):
        b = b * 0 if one_batch else b
        h = h * 0 if one_head else h
        return keys_of_tile[b, h, tile_of_query[b, h, q_idx], kv_idx]

    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=mask_mod,
        seq_lengths=(plan.n_q, plan.n_kv),
    )


def _edges(length: int, block: int, device: torch.device) -> torch.Tensor:
    """Block boundaries `0, block, 2 * block, ..., length`."""
    edges = torch.arange(0, length + block, block, device=device)
    return edges.clamp(max=length)


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts `[..., nq]` and indices `[..., nq, nk]` of the marked blocks, marked ones first."""
    indices = torch.argsort((~blocks).to(torch.int8), dim=-1, stable=True)
    return blocks.sum(-1).int(), indices.int().contiguous()
