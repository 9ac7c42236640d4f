"""Attention over what stands for the keys that a plan skips."""

from __future__ import annotations

import torch

from .merge import attend_scores
from .orders import permute, unpermute
from .plan import BlockPlan

SCORES = 2**26  # scores held at once, over all heads: a quarter of a GiB
ROWS = 64  # queries of a tile that share its own keys at once


def attend_skipped(q: torch.Tensor, plan: BlockPlan, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the stand-ins of the clusters that each query does not read.

    Args:
        q: `[B, H, n_q, D]`, not permuted.
        plan: with `selection` and `skipped`.
        scale: multiplies the scores.

    Returns:
        `([B, H, n_q, D] in the dtype of q, [B, H, n_q] float32)`, output and log-sum-exp, to be merged with those over
        the selected keys. Gradients flow to `q` alone: the stand-ins belong to the plan.
    """
    return _attend_own(q, plan, scale) if plan.skipped.of_each_tile else _attend_shared(q, plan, scale)


def _attend_shared(q: torch.Tensor, plan: BlockPlan, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One key and value a cluster, for all tiles."""
    batch, heads, queries, _ = q.shape
    bias = plan.stand_in_bias().expand(batch, heads, -1, -1)
    tile = plan.tile_of_token().expand(batch, heads, -1)
    rows = max(1, SCORES // (batch * heads * bias.shape[-1]))
    outputs, sums = [], []
    for start in range(0, queries, rows):
        piece = slice(start, start + rows)
        own = tile[:, :, piece, None].expand(-1, -1, -1, bias.shape[-1])
        scores = (q[:, :, piece].float() * scale) @ plan.skipped.key.float().transpose(-1, -2) + bias.gather(2, own)
        out, lse = attend_scores(scores, plan.skipped.value.float())
        outputs.append(out.to(q.dtype))
        sums.append(lse)
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def _attend_own(q: torch.Tensor, plan: BlockPlan, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of each tile's own, piece by piece of the tiles."""
    batch, heads, queries, dim = q.shape
    first, length, tile = (x.expand(batch, heads, -1).flatten(0, 1) for x in plan.cut(ROWS))
    tables = (plan.skipped.key, plan.skipped.value, plan.stand_in_bias())
    key, value, bias = (x.expand(batch, heads, *x.shape[2:]).flatten(0, 1) for x in tables)
    permuted = permute(q, plan.q_order).flatten(0, 1)
    offsets = torch.arange(ROWS, device=q.device)
    numbers = first.shape[-1] * max(ROWS, 2 * dim) * bias.shape[-1]
    at_once = max(1, SCORES // numbers)
    outputs, sums = [], []
    for start in range(0, batch * heads, at_once):
        some = slice(start, start + at_once)
        rows = first[some].unsqueeze(-1) + offsets
        inside = offsets < length[some].unsqueeze(-1)
        rows = torch.where(inside, rows, queries).flatten(1).long()  # one row more takes what is in no tile
        shape = (rows.shape[0], -1, ROWS)
        x = _padded(permuted[some]).gather(1, rows.unsqueeze(-1).expand(-1, -1, dim)).view(*shape, dim).float()
        own = tile[some].long()
        keys, values = (_of_tile(table[some], own).float() for table in (key, value))
        scores = (x * scale) @ keys.transpose(-1, -2) + _of_tile(bias[some], own).unsqueeze(-2)
        out, lse = attend_scores(scores, values)
        made = x.new_zeros(rows.shape[0], queries + 1, dim)
        outputs.append(made.scatter(1, rows.unsqueeze(-1).expand(-1, -1, dim), out.flatten(1, 2))[:, :-1])
        logs = x.new_full((rows.shape[0], queries + 1), -torch.inf)
        sums.append(logs.scatter(1, rows, lse.flatten(1))[:, :-1])
    out, lse = (torch.cat(parts).unflatten(0, (batch, heads)) for parts in (outputs, sums))
    return unpermute(out.to(q.dtype), plan.q_order), unpermute(lse.unsqueeze(-1), plan.q_order).squeeze(-1)


def _padded(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1)


def _of_tile(table: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """Rows of `table [G, T, ...]` for each of `tile [G, P]`."""
    index = (tile + table.shape[1] * torch.arange(table.shape[0], device=tile.device).unsqueeze(-1)).flatten()
    return table.flatten(0, 1).index_select(0, index).view(*tile.shape, *table.shape[2:])
