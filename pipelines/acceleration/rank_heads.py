"""The heads of one of several processes that share a layer's, and which process gets which."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ...attention.account.records import CallRecord
from ...attention.heads import HeadShare

UNEVEN = 1.05  # the pairs of the busiest process over the mean of all, above which heads change places,
CALLS = 8  # that are remembered
WORTHWHILE = 1.02  # if that lowers them by this factor


class RankHeads(HeadShare):
    """The heads of one of several processes.

    Args:
        group: the processes.
        count: heads of the layer.
        order: the heads, those of the first process first; each has as many as the first, the last what is left. In
            their own order when None.
    """

    def __init__(self, group: dist.ProcessGroup, count: int, order: Sequence[int] | None = None) -> None:
        self.group, self.count = group, count
        self.ranks = dist.get_world_size(group)
        self.most = -(-count // self.ranks)
        self.order = None if order is None else tuple(order)
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None  # the order and its inverse, on the device
        first = dist.get_rank(group) * self.most
        self.own = slice(first, min(first + self.most, count))
        # Pairs of each head, on the host, of the last calls: a step has one or two, and not every method asks for them.
        self._taken: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque(maxlen=CALLS)

    def total(self, heads: int) -> int:
        return self.count

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        missing = self.most - x.shape[1]
        if missing:
            x = F.pad(x, (*itertools.repeat(0, 2 * (x.ndim - 2)), 0, missing))
        return self.restored(self._each(x).transpose(0, 1).flatten(1, 2)[:, : self.count])

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        return self.arranged(x)[:, self.own]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._each(x[None]).sum((0, 1))

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, H, ...]` with the heads of the first process first."""
        return x if self.order is None else x.index_select(1, self._index(self.order, x.device)[0])

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `arranged`."""
        return x if self.order is None else x.index_select(1, self._index(self.order, x.device)[1])

    def computed(self, pairs: torch.Tensor) -> torch.Tensor:
        pairs = self.gather(pairs).sum(0)
        event = torch.cuda.Event() if pairs.is_cuda else None
        self._taken.append((pairs.to("cpu", non_blocking=True), event))
        if event is not None:
            event.record(torch.cuda.current_stream(pairs.device))  # which need not be that of the current device
        padded = F.pad(self.arranged(pairs[None]), (0, self.ranks * self.most - self.count))
        return padded.view(self.ranks, self.most).sum(-1)

    def taken_over(self, kept: dict[str, Any], before: HeadShare) -> dict[str, Any]:
        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(move(part) for part in value)
            return self.mine(before.gather(value)) if isinstance(value, torch.Tensor) else value

        return {name: move(value) for name, value in kept.items()}

    def balanced(self) -> RankHeads:
        """The heads to have in the next call of the layer, after what each took in this one.

        The numbers were copied when the call was made, a step ago: to read them waits for nothing.
        """
        pairs = [0] * self.count
        for more, event in self._taken:
            if event is not None:
                event.synchronize()
            pairs = [old + new for old, new in zip(pairs, more.tolist(), strict=True)]
        self._taken.clear()
        now = _busiest(pairs, range(self.count) if self.order is None else self.order, self.most)
        if now * self.ranks <= UNEVEN * sum(pairs):
            return self
        better = assign(pairs, self.ranks)
        if WORTHWHILE * _busiest(pairs, better, self.most) > now:
            return self
        return RankHeads(self.group, self.count, better)

    def _index(self, order: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if self._places is None or self._places[0].device != device:
            places = torch.tensor(order, device=device)
            self._places = places, places.argsort()
        return self._places

    def _each(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of every process, `[ranks, ...]`."""
        sent = x.contiguous().view(torch.uint8)  # neither gloo nor NCCL know numbers of 16 bits
        parts = [torch.empty_like(sent) for _ in range(self.ranks)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.stack(parts).view(x.dtype)


def assign(pairs: Sequence[int], ranks: int) -> list[int]:
    """Heads by process, so that all compute about as many pairs: the largest first, to who has fewest and has room.

    Args:
        pairs: of each head.
        ranks: processes, each with as many heads as the first; the last has what is left.

    Returns:
        The heads, those of the first process first.
    """
    most = -(-len(pairs) // ranks)
    room = [min(most, len(pairs) - rank * most) for rank in range(ranks)]
    given: list[list[int]] = [[] for _ in range(ranks)]
    for head in sorted(range(len(pairs)), key=lambda head: (-pairs[head], head)):
        free = [rank for rank in range(ranks) if room[rank]]
        # Where two have as few, to who has less room: the other can still take small ones.
        rank = min(free, key=lambda rank: (sum(pairs[h] for h in given[rank]), room[rank]))
        given[rank].append(head)
        room[rank] -= 1
    return [head for heads in given for head in sorted(heads)]


def _busiest(pairs: Sequence[int], order: Sequence[int], most: int) -> int:
    """Pairs of the process that computes most."""
    starts = range(0, len(order), most)
    return max(sum(pairs[head] for head in order[start : start + most]) for start in starts)


def balance_note(records: Sequence[CallRecord]) -> list[str]:
    """What a report says of how evenly processes share the pairs of sparse calls; nothing in one process."""
    shares = [(record, record.details["rank_pairs"]) for record in records if "rank_pairs" in record.details]
    if not shares:
        return []
    busiest = [(max(pairs) * len(pairs) / sum(pairs), record) for record, pairs in shares]
    most, record = max(busiest, key=lambda entry: entry[0])
    return [
        f"{len(shares[0][1])} processes share the heads: the busiest computes {median(b for b, _ in busiest):.2f} "
        f"times the mean of all in the median sparse call, {most:.2f} times in the worst (layer {record.layer} at step "
        f"{record.step})"
    ]
