"""Dense attention of each query tile over its gathered runs of keys: any plan without a compiler."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from typing import Any

import torch
import torch.nn.functional as F

from ..clustering.slopes import follow_in_tile
from ..gradients import wants_gradient
from ..groups import by_group, by_head, dense_attention, repeat_heads
from ..merge import attend_scores
from ..orders import permute, unpermute
from ..plan import BlockPlan
from ..rows import token_rows
from ..threads import each
from .base import ANY_HEAD_DIM, EVERYWHERE, Backend, Capability, without_autocast

MAX_TILE_ROWS = 512
THREADS_PAY = 2**13  # pairs of a tile
FEW_ROWS = 192  # below it torch's CPU kernel works on 32 rows at a time


class GatherBackend(Backend):
    """One `scaled_dot_product_attention` per query tile, over exactly the keys its runs name.

    Nothing is masked and nothing padded, so the pairs computed are the pairs of the plan, at the price of one call per
    tile: good on the CPU, where a call is cheap next to its work, slow on a GPU. Keys and values lie side by side, so
    that one copy gathers both; what stands for skipped clusters goes in front of them, with its bias.
    """

    name = "gather"
    summary = "one dense SDPA per query tile on its gathered keys; best for scattered plans on the CPU"
    capability = Capability(
        devices=EVERYWHERE,
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        max_head_dim=ANY_HEAD_DIM,
        lse=EVERYWHERE,
        backward=EVERYWHERE,
        sparse=True,
        stand_ins=EVERYWHERE,
    )

    def takes_slopes(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        # Autocast rounds the queries, which the slopes would follow.
        return _in_place(q, k, v) and not torch.is_autocast_enabled(q.device.type)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        slopes = self.takes_slopes(q, k, v)
        attend = self._attend
        if torch.compiler.is_compiling():  # a graph for each tile would take minutes to make
            attend = torch.compiler.disable(attend)
        if plan.skipped is not None and torch.is_autocast_enabled(q.device.type):
            return without_autocast(attend, q, k, v, plan, scale, return_lse, slopes)
        return attend(q, k, v, plan, scale, return_lse, slopes)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockPlan,
        scale: float,
        return_lse: bool,
        slopes: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        in_place = _in_place(q, k, v)
        queries = q if in_place else permute(q, plan.q_order)
        pairs = permute(torch.cat([k, v], -1), plan.kv_order)
        batch, heads = plan.run_start.shape[:2]
        if heads == 1 and plan.skipped is not None:  # stand-ins of each query head go in front of its keys
            pairs = repeat_heads(pairs, q.shape[1])
        group = q.shape[1] // pairs.shape[1]
        bias = None if plan.skipped is None else plan.stand_in_bias()
        entries, scratch = [], _Scratch()
        for b in range(batch):
            # A plan for all batch entries or heads is computed for all of them in one call.
            batch_slice = slice(None) if batch == 1 else slice(b, b + 1)
            for h in range(heads):
                of_q, of_kv = (slice(None) if heads == 1 else slice(at, at + 1) for at in (h, h // group))
                some, others = queries[batch_slice, of_q], pairs[batch_slice, of_kv]
                entries.append((_Tiles(some, others, k.shape[-1], plan, bias, b, h, scratch), batch_slice, of_q))
        if not in_place:
            rows = [_join([e.attend(tile, None, scale, return_lse) for tile in e.tiles], 2) for e, _, _ in entries]
            out, lse = _join([_join(rows[at : at + heads], 1) for at in range(0, len(rows), heads)], 0)
            out = unpermute(out, plan.q_order).to(q.dtype)  # autocast may have made it another
            lse = None if lse is None else unpermute(lse.unsqueeze(-1), plan.q_order).squeeze(-1)
            if wants_gradient(q, k, v) and not out.requires_grad:  # nothing is read
                zero = sum(x[:, :, :0].sum() for x in (q, k, v))  # of no numbers, any of which may be infinite
                out, lse = out + zero, None if lse is None else lse + zero
            return out, lse
        places = _Places(q, v.shape[-1], plan.q_order, return_lse)
        work = [(*entry, tile) for entry in entries for tile in entry[0].tiles]

        def attend(piece: tuple[_Tiles, slice, slice, int]) -> None:
            entry, of_batch, of_heads, tile = piece
            start = entry.starts[tile]
            at = places.index[of_batch, of_heads, start : start + entry.lengths[tile]]
            own = places.take(at)
            out, lse = entry.attend(tile, own, scale, return_lse)
            if slopes and entry.stand_ins is not None:
                out = entry.stand_ins.follow(out, own, tile)
            places.put(at, out, lse)

        each(attend, work, small=_tiles_are_small(q, plan, len(work)))
        return places.out, places.lse


def _in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether tiles read their queries, and write their outputs, where the model has them.

    Elsewhere an operation for each tile costs more than the passes over q and the output that it saves.
    """
    return q.device.type == "cpu" and not wants_gradient(q, k, v)


Result = tuple[torch.Tensor, torch.Tensor | None]
"""Output `[B', H', rows, D]` and, where asked for, log-sum-exp `[B', H', rows]`."""


class _Places:
    """Queries and outputs where the model has them: a tile reads and writes its own rows, on its own thread.

    Args:
        q: `[B, H, N, D]`. width: channels of the output. order: `[1|B, 1|H, N]` of the queries, or None.
    """

    def __init__(self, q: torch.Tensor, width: int, order: torch.Tensor | None, return_lse: bool) -> None:
        self._queries, first, step = token_rows(q)
        order = torch.arange(q.shape[2], device=q.device) if order is None else order
        self.index = order * step + first
        """Rows of the queries in the order of the plan, `[B, H, N]`."""
        self.out = self._like(q, step, q.dtype, width)
        self.lse = self._like(q, step, torch.float32) if return_lse else None
        self._outputs = token_rows(self.out)[0]
        self._sums = None if self.lse is None else token_rows(self.lse)[0]

    @staticmethod
    def _like(q: torch.Tensor, step: int, dtype: torch.dtype, *width: int) -> torch.Tensor:
        """`[B, H, N, *width]`, tokens and heads in memory as the rows of q are."""
        batch, heads, tokens, _ = q.shape
        if step == 1:
            return q.new_empty(batch, heads, tokens, *width, dtype=dtype)
        return q.new_empty(batch, tokens, heads, *width, dtype=dtype).transpose(1, 2)

    def take(self, at: torch.Tensor) -> torch.Tensor:
        """The queries at some of `index`, `[B', H', rows]`."""
        return self._queries.index_select(0, at.flatten()).view(*at.shape, -1)

    def put(self, at: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        self._outputs.index_copy_(0, at.flatten(), out.reshape(at.numel(), -1).to(self.out.dtype))
        if self._sums is not None and lse is not None:
            self._sums.index_copy_(0, at.flatten(), lse.flatten())


class _Scratch(threading.local):
    """The memory of a thread that all copies of keys and values go through: new memory for each costs more than it."""

    def __init__(self) -> None:
        self._numbers: torch.Tensor | None = None

    def of(self, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """Uninitialised, until the next call on this thread."""
        count = math.prod(shape)
        if self._numbers is None or self._numbers.numel() < count:
            self._numbers = like.new_empty(count + count // 4)  # so that tiles of rising size take new memory few times
        return self._numbers[:count].view(shape)


def _join(results: list[Result], dim: int) -> Result:
    if len(results) == 1:
        return results[0]
    outputs, sums = zip(*results, strict=True)
    return torch.cat(outputs, dim), None if sums[0] is None else torch.cat(sums, dim)


def _tiles_are_small(q: torch.Tensor, plan: BlockPlan, tiles: int) -> bool:
    """Whether threads would wait for one another's turn in Python."""
    together = q.shape[0] * q.shape[1] // (plan.run_start.shape[0] * plan.run_start.shape[1])
    return int(plan.pairs().sum()) * together < THREADS_PAY * tiles


class _StandIns:
    """What the tiles of plan entry `(b, h)` read of clusters: all stand-ins, -inf as the bias of those not skipped.

    Args:
        plan: with `skipped`. bias: its `stand_in_bias()`.
        dtype: of keys and values.
    """

    def __init__(self, plan: BlockPlan, bias: torch.Tensor, b: int, h: int, dtype: torch.dtype) -> None:
        # A plan of one entry for all may have tables for each: its tiles are then worked on for all at once.
        lead = plan.run_start.shape[:2]
        own = [None if size == 1 else index for size, index in zip(lead, (b, h), strict=True)]
        joined = plan.skipped.side_by_side()
        tables = (plan.skipped.key, plan.skipped.value) if joined is None else (joined,)
        self.tables = [x[_entry(x, 0, own[0]), _entry(x, 1, own[1])] for x in tables]
        self.bias = bias[_entry(bias, 0, own[0]), _entry(bias, 1, own[1])]
        self.slope, self.centre = (
            None if x is None else x[_entry(x, 0, own[0]), _entry(x, 1, own[1])]
            for x in (plan.skipped.slope, plan.skipped.centre)
        )
        self.dtype, self.count, self.of_each_tile = dtype, self.bias.shape[-1], plan.skipped.of_each_tile

    def of(self, tile: int) -> torch.Tensor:
        """Keys and values side by side, `[B', H', C, 2D]`.

        Tile by tile, since those of all tiles are as large as many copies of k and v.
        """
        parts = [(x[:, :, tile] if self.of_each_tile else x).to(self.dtype) for x in self.tables]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def bias_of(self, tile: int) -> torch.Tensor:
        """`[B', H', 1, C]` float32."""
        return self.bias[:, :, tile].unsqueeze(-2)

    def follow(self, out: torch.Tensor, queries: torch.Tensor, tile: int) -> torch.Tensor:
        """`out [B', H', rows, D]` and how the values move with the queries."""
        if self.slope is None or tile >= self.slope.shape[2]:
            return out
        return follow_in_tile(
            out, queries, self.slope[:, :, tile], None if self.centre is None else self.centre[:, :, tile]
        )


def _entry(x: torch.Tensor, dim: int, index: int | None) -> slice:
    return slice(None) if index is None or x.shape[dim] == 1 else slice(index, index + 1)


class _Tiles:
    """The tiles of plan entry `(b, h)`.

    Args:
        q: `[B', H', n_q, D]`. pairs: keys and values side by side, `[B', H'kv, n_kv, D + Dv]`; both permuted, q only
            where it is not read in place.
        key_width: D.
        bias: `plan.stand_in_bias()`, where it has stand-ins; made once for all entries.
        scratch: that all entries share.

    Raises:
        ValueError: the tiles do not cover the queries.
    """

    def __init__(
        self,
        q: torch.Tensor,
        pairs: torch.Tensor,
        key_width: int,
        plan: BlockPlan,
        bias: torch.Tensor | None,
        b: int,
        h: int,
        scratch: _Scratch,
    ) -> None:
        self.q, self.pairs, self.key_width = q, pairs, key_width
        self.stand_ins = None if bias is None else _StandIns(plan, bias, b, h, pairs.dtype)
        self.starts, self.lengths = plan.tile_start[b, h].tolist(), plan.tile_len[b, h].tolist()
        self.run_starts, self.run_lengths = plan.run_start[b, h].tolist(), plan.run_len[b, h].tolist()
        if sum(self.lengths) != q.shape[2]:
            raise ValueError(
                f"the tiles of the plan hold {sum(self.lengths)} of the {q.shape[2]} queries: they must cover all of "
                "them (BlockPlan.validate says where they do not)."
            )
        self.tiles = [tile for tile, length in enumerate(self.lengths) if length]
        self.extra = 0 if self.stand_ins is None else self.stand_ins.count
        self.grad = wants_gradient(q, pairs)
        self.scratch = scratch
        runs = [self._runs(tile) for tile in range(len(self.starts))] if self.grad else []
        self.gathered = _GatherTiles.apply(pairs, runs) if self.grad else ()

    @functools.cached_property
    def rows(self) -> dict[int, torch.Tensor]:
        """The queries that are worked on at once, by the first of them.

        One split, whose gradient is one concatenation: that of a slice is as large as q, and there are many.
        """
        firsts = [
            row
            for start, length in zip(self.starts, self.lengths, strict=True)
            for row in range(start, start + length, MAX_TILE_ROWS)
        ]
        sizes = [after - first for first, after in itertools.pairwise([*firsts, self.q.shape[2]])]
        return dict(zip(firsts, self.q.split(sizes, 2), strict=True))

    def attend(self, tile: int, queries: torch.Tensor | None, scale: float, return_lse: bool) -> Result:
        """The rows of a tile that is not empty, `queries [B', H', rows, D]`, or those of q where it is permuted."""
        start, length, runs = self.starts[tile], self.lengths[tile], self._runs(tile)
        if not runs and not self.extra:
            shape = (*self.q.shape[:2], length)
            lse = self.q.new_full(shape, -torch.inf, dtype=torch.float32) if return_lse else None
            return self.q.new_zeros(*shape, self.pairs.shape[-1] - self.key_width), lse
        pairs, bias = self._gather(tile, runs)
        keys, values = pairs[..., : self.key_width], pairs[..., self.key_width :]
        if queries is None:
            pieces = [self.rows[row] for row in range(start, start + length, MAX_TILE_ROWS)]
        else:
            pieces = list(queries.split(MAX_TILE_ROWS, 2))
        return _join([_attend(piece, keys, values, bias, scale, return_lse) for piece in pieces], 2)

    def _runs(self, tile: int) -> list[tuple[int, int]]:
        """Start and length of the runs of a tile that are not empty."""
        return [(s, n) for s, n in zip(self.run_starts[tile], self.run_lengths[tile], strict=True) if n > 0]

    def _gather(self, tile: int, runs: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys and values of a tile, a view where there is one run, else a copy; and the bias of the stand-ins."""
        lead, width = self.pairs.shape[:2], self.pairs.shape[-1]
        parts = (self.gathered[tile],) if self.gathered else _cut_out(self.pairs, runs)
        first = bias = None
        if self.stand_ins is not None:
            first, bias = self.stand_ins.of(tile).expand(*lead, -1, -1), self.stand_ins.bias_of(tile)
        if self.grad or len(parts) + self.extra == 1:
            parts = parts if first is None else (first, *parts)
            return parts[0] if len(parts) == 1 else torch.cat(parts, 2), bias
        copy = self.scratch.of(self.pairs, *lead, self.extra + sum(length for _, length in runs), width)
        if first is not None:
            copy[:, :, : self.extra] = first
        if parts:
            torch.cat(parts, 2, out=copy[:, :, self.extra :])
        return copy, bias


class _GatherTiles(torch.autograd.Function):
    """The keys and values of each tile, a tuple of `[B, H, n, W]`, from those of all, `[B, H, N, W]`.

    As one operation, because the gradient of each slice would be a tensor as large as all keys, and adding these up
    would take longer than attention itself. Here each tile's gradient is added where it came from, in float32 at least:
    a key that many tiles read has as many terms, and of a sum in half precision the later ones would be lost.
    """

    @staticmethod
    def forward(ctx: Any, pairs: torch.Tensor, runs: list[list[tuple[int, int]]]) -> tuple[torch.Tensor, ...]:
        ctx.runs, ctx.like = runs, pairs.shape
        return tuple(torch.cat(_cut_out(pairs, tile), 2) if tile else pairs[:, :, :0].clone() for tile in runs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grads[0].new_zeros(ctx.like, dtype=torch.promote_types(grads[0].dtype, torch.float32))
        for tile, grad in zip(ctx.runs, grads, strict=True):
            at = 0
            for start, length in tile:
                total.narrow(2, start, length).add_(grad.narrow(2, at, length))
                at += length
        return total.to(grads[0].dtype), None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, return_lse: bool
) -> Result:
    """Dense attention of one tile on its keys, of which the first ones may have a bias."""
    one_head = q.shape[0] * q.shape[1] == 1  # else the scores of all heads would be too much memory
    exact = q.dtype in (torch.float32, torch.float64)  # half precision would need copies
    small = q.device.type == "cpu" and q.shape[2] < FEW_ROWS and one_head and exact and _few_rows_are_slow()
    if not return_lse and not small and bias is None:
        return dense_attention(q, k, v, scale), None
    wide, heads = torch.promote_types(q.dtype, torch.float32), q.shape[1]
    if not return_lse and not small and q.device.type == "cpu":
        # Beside half precision, too, in float32: rounded, it would be off by per cents. One row for all, which is
        # never expanded.
        mask = F.pad(bias.to(wide), (0, k.shape[2] - bias.shape[-1]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None
    scores = (by_group(q, k.shape[1]).to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    if bias is not None:
        scores[..., : bias.shape[-1]] += bias
    if not return_lse:
        return by_head((torch.softmax(scores, -1) @ v.to(wide)).to(q.dtype), heads), None
    out, lse = attend_scores(scores, v.to(wide))
    return by_head(out.to(q.dtype), heads), by_head(lse.float(), heads)


@functools.cache
def _few_rows_are_slow() -> bool:
    """Whether products of 32 rows at a time cost more than the scores of all rows do as memory.

    On an EPYC they take twice as long as those of all rows; on a Xeon with AVX-512 as long, and the kernel is then
    1.2 times as fast as its operations one by one.
    """
    return torch.backends.cpu.get_cpu_capability() != "AVX512"


def _cut_out(x: torch.Tensor, runs: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """The rows of each run, as views: one `split` for all of them, because a Python slice for each takes far longer."""
    sizes: list[int] = []
    at = 0
    for start, length in runs:
        sizes += (start - at, length)
        at = start + length
    return x.split([*sizes, x.shape[2] - at], 2)[1::2]
