"""Runs of keys: the arithmetic of `(start, length)` intervals that a `BlockPlan` is made of.

Everything here is vectorised over leading dimensions and has shapes that do not depend on values unless said, so that
the same code serves a CPU test and a CUDA planning step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .own_kernels import use_kernels

MOST_AT_ONCE = 2**24
"""Segments that the CPU merges at once, those of all tiles counted: each takes some 40 bytes on the way, a gigabyte a
head at 75,600 tokens in blocks of 16."""
FEW_RUNS = 4  # up to so many runs a tile a plan counts as a few long ones, which can be compared one by one


def merge_segments(
    selected: torch.Tensor, sizes: torch.Tensor, max_runs: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join neighbouring selected segments of an axis into runs.

    The segments lie one after the other from position 0; empty ones neither start nor break a run.

    Args:
        selected: `[..., T, C]` bool, the segments each of T query tiles reads.
        sizes: `[..., C]` integer, tokens per segment.
        max_runs: number of run slots R. Without it R is on the CPU the largest number of runs, and on other devices,
            which would have to be waited for, the largest that C segments can make. There, further runs than R are left
            out for the same reason.

    Returns:
        `(run_start, run_len)`, each `[..., T, R]` int32, unused slots at the end with length 0.

    Raises:
        ValueError: an R below 1, or one that does not suffice on the CPU.
    """
    if max_runs is not None and max_runs < 1:
        raise ValueError(f"max_runs is {max_runs}: it must be at least 1, or None for as many as there can be.")
    if use_kernels(selected):
        from .kernels import runs

        return runs.merge_segments(selected, sizes, _most_runs(selected) if max_runs is None else max_runs)
    if selected.device.type != "cpu" or selected.numel() <= MOST_AT_ONCE or selected.ndim < 3:
        return _merged(selected, sizes, max_runs)
    lead = selected.shape[:-2]
    each = zip(selected.flatten(0, -3), sizes.expand(*lead, sizes.shape[-1]).flatten(0, -2), strict=True)
    made = [_merged(of_head, its_sizes, max_runs) for of_head, its_sizes in each]
    slots = max(start.shape[-1] for start, _ in made)
    start, length = (
        torch.stack([F.pad(x, (0, slots - x.shape[-1])) for x in tensors]).unflatten(0, lead)
        for tensors in zip(*made, strict=True)
    )
    return start, length


def _most_runs(selected: torch.Tensor) -> int:
    """The largest number of runs that so many segments can make."""
    return (selected.shape[-1] + 1) // 2


def _merged(selected: torch.Tensor, sizes: torch.Tensor, max_runs: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`merge_segments` in torch's operators."""
    sizes = sizes.to(torch.int64)
    starts = sizes.cumsum(-1) - sizes
    # Empty segments go last, so that "the neighbour before" is always a segment with tokens in it.
    order = torch.argsort((sizes == 0).to(torch.int8), dim=-1, stable=True)
    sizes, starts = sizes.gather(-1, order), starts.gather(-1, order)
    selected = selected.gather(-1, order.unsqueeze(-2).expand(selected.shape)) & (sizes > 0).unsqueeze(-2)

    begins = selected.clone()
    begins[..., 1:] &= ~selected[..., :-1]
    run_of = begins.cumsum(-1) - 1
    if begins.device.type == "cpu":
        needed = max(1, int(begins.sum(-1).max()))
        slots = needed if max_runs is None else max_runs
        if needed > slots:
            raise ValueError(f"max_runs is {max_runs}, but a tile reads {needed} runs of keys: give {needed}, or None.")
    else:
        slots = _most_runs(selected) if max_runs is None else max_runs

    # One slot more than asked for takes the writes of segments that belong to no run.
    shape = (*selected.shape[:-1], slots + 1)
    run_start = torch.zeros(shape, dtype=torch.int64, device=selected.device)
    run_len = torch.zeros(shape, dtype=torch.int64, device=selected.device)
    starts, sizes = (x.unsqueeze(-2).expand(selected.shape) for x in (starts, sizes))
    run_start.scatter_(-1, torch.where(begins, run_of, slots), starts)
    run_len.scatter_add_(-1, torch.where(selected, run_of, slots), sizes)
    return run_start[..., :-1].int(), run_len[..., :-1].int()


def starts_of(sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where segments that lie one after the other start, and their sizes: both `[..., C]` int32, from integers."""
    if use_kernels(sizes):
        from .kernels import runs

        return runs.starts_of(sizes)
    return (sizes.cumsum(-1) - sizes).int(), sizes.int()


def cut_segments(
    start: torch.Tensor, length: torch.Tensor, total: int, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut segments of an axis to pieces of at most `most` members.

    Args:
        start, length: `[..., S]` integer; the segments do not overlap.
        total: length of the axis.
        most: members of a piece.

    Returns:
        `(start, length, segment)`, each `[..., total // most + S]` int32: the pieces in order with the segment each is
        of; unused slots at the end with start `total` and length 0. The shape depends on no value.
    """
    if use_kernels(length):
        from .kernels import runs

        return runs.cut_segments(start, length, total, most)
    start, length = start.long(), length.long()
    pieces = (length + most - 1) // most
    ends = pieces.cumsum(-1)
    slots = total // most + length.shape[-1]
    index = torch.arange(slots, device=length.device).expand(*ends.shape[:-1], -1).contiguous()
    segment = torch.searchsorted(ends.contiguous(), index, right=True)
    real = segment < ends.shape[-1]
    segment = segment.clamp(max=ends.shape[-1] - 1)
    offset = (index - (ends - pieces).gather(-1, segment)) * most
    left = length.gather(-1, segment) - offset
    first = torch.where(real, start.gather(-1, segment) + offset, total)
    return first.int(), torch.where(real, left.clamp(0, most), 0).int(), segment.int()


def expand_runs(run_start: torch.Tensor, run_len: torch.Tensor, length: int) -> torch.Tensor:
    """Write runs `[..., R]` out as a mask `[..., length]` bool."""
    edges = torch.zeros((*run_start.shape[:-1], length + 1), dtype=torch.int32, device=run_start.device)
    edges.scatter_add_(-1, run_start.long(), (run_len > 0).int())
    edges.scatter_add_(-1, (run_start + run_len).long(), -(run_len > 0).int())
    return edges.cumsum(-1)[..., :-1] > 0


def count_below(run_start: torch.Tensor, run_len: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """How many members of the runs `[..., R]` lie below each of `positions [P]`: `[..., P]` int64.

    A loop over R keeps memory at the size of the result where a broadcast would need R times as much.
    """
    total = torch.zeros((*run_start.shape[:-1], positions.numel()), dtype=torch.int64, device=run_start.device)
    for start, size in zip(run_start.long().unbind(-1), run_len.long().unbind(-1), strict=True):
        total += (positions - start.unsqueeze(-1)).clamp(min=0).minimum(size.unsqueeze(-1))
    return total
