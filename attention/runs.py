"""Runs of keys: the arithmetic of `(start, length)` intervals that a `BlockPlan` is made of.

Everything here is vectorised over leading dimensions and has shapes that do not depend on values unless said, so that
the same code serves a CPU test and a CUDA planning step.
"""

from __future__ import annotations

import torch

FEW_RUNS = 4  # up to so many runs a tile a plan counts as a few long ones, which can be compared one by one


def merge_segments(
    selected: torch.Tensor, sizes: torch.Tensor, max_runs: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join neighbouring selected segments of an axis into runs.

    The segments lie one after the other from position 0; empty ones neither start nor break a run.

    Args:
        selected: `[..., T, C]` bool, the segments each of T query tiles reads.
        sizes: `[..., C]` integer, tokens per segment.
        max_runs: number of run slots R. Without it R is the largest number of runs, which needs one host sync.

    Returns:
        `(run_start, run_len)`, each `[..., T, R]` int32, unused slots at the end with length 0.
    """
    sizes = sizes.to(torch.int64)
    starts = sizes.cumsum(-1) - sizes
    # Empty segments go last, so that "the neighbour before" is always a segment with tokens in it.
    order = torch.argsort((sizes == 0).to(torch.int8), dim=-1, stable=True)
    sizes, starts = sizes.gather(-1, order), starts.gather(-1, order)
    selected = selected.gather(-1, order.unsqueeze(-2).expand(selected.shape)) & (sizes > 0).unsqueeze(-2)

    begins = selected.clone()
    begins[..., 1:] &= ~selected[..., :-1]
    run_of = begins.cumsum(-1) - 1
    slots = max_runs if max_runs is not None else max(1, int(begins.sum(-1).max()))

    # One slot more than asked for takes the writes of segments that belong to no run.
    shape = (*selected.shape[:-1], slots + 1)
    run_start = torch.zeros(shape, dtype=torch.int64, device=selected.device)
    run_len = torch.zeros(shape, dtype=torch.int64, device=selected.device)
    starts, sizes = (x.unsqueeze(-2).expand(selected.shape) for x in (starts, sizes))
    run_start.scatter_(-1, torch.where(begins, run_of, slots), starts)
    run_len.scatter_add_(-1, torch.where(selected, run_of, slots), sizes)
    return run_start[..., :-1].int(), run_len[..., :-1].int()


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
