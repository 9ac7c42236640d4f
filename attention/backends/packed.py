"""Many small tiles of like size in one batched product: any plan of small tiles on the CPU."""

from __future__ import annotations

import torch

from ..merge import attend_scores
from ..plan import BlockPlan, permute, unpermute
from .base import ANY_HEAD_DIM, Backend, Capability

ROWS = 64  # queries of a piece of a tile
PACK = 2**21  # numbers of gathered keys and values at once: what stays in the processor's cache
WASTE = 0.85  # share of the longest list of keys in a pack that the shortest may have


class PackedBackend(Backend):
    """Tiles are cut to pieces of some queries, pieces that read about as many keys are packed together, and each pack is
    two batched products over the keys that are gathered for it.

    Pairs computed are those of the plan and some padding. A call for each tile, as in `gather`, costs more than its
    work where tiles have few queries, and that is what this is for.
    """

    name = "packed"
    summary = "batched products over packs of small tiles; for short sequences on the CPU"
    capability = Capability(
        devices=("cpu",),  # the sizes of the packs are read on the host
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        max_head_dim=ANY_HEAD_DIM,
        lse=("cpu",),
        backward=("cpu",),
        sparse=True,
        stand_ins=("cpu",),
    )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, heads, n_q, dim = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        queries = (permute(q, plan.q_order).to(wide) * scale).flatten(0, 2)
        table = permute(torch.cat([k, v], -1), plan.kv_order).to(wide).flatten(0, 2)
        keys = _Keys(plan, batch, heads)
        if plan.skipped is not None:
            table = torch.cat([table, keys.stand_ins().to(wide)])
        rows, inside, tile = _pieces(plan, batch, heads)
        count = keys.count[tile]
        order = count.argsort()
        places, outputs, sums = [], [], []
        for pack in order.split(_packs(count[order].tolist(), table.shape[-1])):
            longest = int(inside[pack].sum(-1).max())
            index, bias = keys.of(tile[pack], int(count[pack[-1]]))
            pairs = table.index_select(0, index.flatten()).view(*index.shape, -1)
            some = rows[pack, :longest]
            x = queries.index_select(0, some.flatten()).view(*some.shape, dim)
            scores = torch.baddbmm(bias.to(wide).unsqueeze(1), x, pairs[..., :dim].transpose(1, 2))
            if return_lse:
                out, lse = attend_scores(scores, pairs[..., dim:])
                sums.append(lse[inside[pack, :longest]])
            else:
                out = scores.softmax(-1) @ pairs[..., dim:]
            real = inside[pack, :longest]
            outputs.append(out[real])
            places.append(some[real])
        place = torch.cat(places)
        back = torch.empty_like(place).scatter_(0, place, torch.arange(len(place)))
        out = torch.cat(outputs).index_select(0, back).view(batch, heads, n_q, -1).to(q.dtype)
        out = unpermute(out, plan.q_order)
        if not return_lse:
            return out, None
        lse = torch.cat(sums)[back].view(batch, heads, n_q, 1).float()
        return out, unpermute(lse, plan.q_order)[..., 0]


class _Keys:
    """Which rows of the table of keys and values each tile reads, and with which bias."""

    def __init__(self, plan: BlockPlan, batch: int, heads: int) -> None:
        self.plan, self.batch, self.heads = plan, batch, heads
        read = plan.keys_of_tile().expand(batch, heads, -1, -1)
        self.tiles = read.shape[2]
        entry, key = read.flatten(0, 2).nonzero().unbind(-1)
        self.flat = key + entry // self.tiles * plan.n_kv
        self.read = read.sum(-1).flatten()
        self.start = self.read.cumsum(0) - self.read
        self.extra = 0 if plan.skipped is None else plan.selection[1].shape[-1]
        self.count = (self.read + self.extra).clamp(min=1)
        if self.extra:
            self.bias = plan.stand_in_bias().expand(batch, heads, -1, -1).flatten(0, 2)

    def stand_ins(self) -> torch.Tensor:
        """Keys and values of all stand-ins, `[rows, D + Dv]`."""
        shape = (self.batch, self.heads, *self.plan.skipped.key.shape[2:-1], -1)
        tables = (x.expand(*shape) for x in (self.plan.skipped.key, self.plan.skipped.value))
        return torch.cat(list(tables), -1).flatten(0, -2)

    def of(self, tile: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the table `[P, K]` and their bias `[P, K]` for some tiles, -inf where there is nothing to read."""
        offsets = torch.arange(most - self.extra)
        real = offsets < self.read[tile].unsqueeze(-1)
        index = self.flat[(self.start[tile].unsqueeze(-1) + offsets).clamp(max=max(0, len(self.flat) - 1))]
        bias = torch.zeros(real.shape).masked_fill(~real, -torch.inf)
        if self.extra:
            own = self.plan.skipped.bias is not None
            first = self.batch * self.heads * self.plan.n_kv + (tile if own else tile // self.tiles) * self.extra
            index = torch.cat([first.unsqueeze(-1) + torch.arange(self.extra), index], -1)
            bias = torch.cat([self.bias[tile], bias], -1)
        return index, bias


def _pieces(plan: BlockPlan, batch: int, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `[P, ROWS]` of each piece of a tile over all heads, which of them are real, and the tile `[P]`."""
    first, length, tile = (x.expand(batch, heads, -1).flatten(0, 1).long() for x in plan.cut(ROWS))
    head = torch.arange(batch * heads).unsqueeze(-1)
    real = length > 0
    start = (first + head * plan.n_q)[real].unsqueeze(-1)
    offsets = torch.arange(ROWS)
    inside = offsets < length[real].unsqueeze(-1)
    tiles = plan.tile_len.shape[-1]
    return torch.where(inside, start + offsets, start), inside, (tile + head * tiles)[real]


def _packs(counts: list[int], width: int) -> list[int]:
    """Sizes of packs of pieces that are in order of the keys they read."""
    sizes, first = [], 0
    for index, count in enumerate(counts):
        if index > first and (counts[first] < WASTE * count or (index + 1 - first) * count * width > PACK):
            sizes.append(index - first)
            first = index
    return [*sizes, len(counts) - first]
