"""Dense attention of each query tile over its gathered runs of keys: any plan without a compiler."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..plan import BlockPlan, permute, unpermute
from .base import ANY_HEAD_DIM, Backend, Capability

MAX_TILE_ROWS = 256


class GatherBackend(Backend):
    """One `scaled_dot_product_attention` per query tile, over exactly the keys its runs name.

    Nothing is masked and nothing padded, so the pairs computed are the pairs of the plan, at the price of one call per
    tile: good on the CPU, where a call is cheap next to its work, slow on a GPU.
    """

    name = "gather"
    summary = "one dense SDPA per query tile on its gathered keys; best for scattered plans on the CPU"
    capability = Capability(
        devices=("cpu", "cuda"),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        max_head_dim=ANY_HEAD_DIM,
        lse=(),
        backward=("cpu", "cuda"),
        sparse=True,
    )

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        queries, keys, values = permute(q, plan.q_order), permute(k, plan.kv_order), permute(v, plan.kv_order)
        batch, heads = plan.run_start.shape[:2]
        rows = []
        for b in range(batch):
            # A plan for all batch entries or heads is computed for all of them in one call.
            batch_slice = slice(None) if batch == 1 else slice(b, b + 1)
            row = []
            for h in range(heads):
                head_slice = slice(None) if heads == 1 else slice(h, h + 1)
                row.append(
                    _attend_tiles(*(x[batch_slice, head_slice] for x in (queries, keys, values)), plan, b, h, scale)
                )
            rows.append(torch.cat(row, 1) if heads > 1 else row[0])
        out = torch.cat(rows, 0) if batch > 1 else rows[0]
        return unpermute(out, plan.q_order), None


def _attend_tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, b: int, h: int, scale: float
) -> torch.Tensor:
    """Attention of every tile of plan entry `(b, h)`, `[B', H', n_q, D]`."""
    starts, lengths = plan.tile_start[b, h].tolist(), plan.tile_len[b, h].tolist()
    run_starts, run_lengths = plan.run_start[b, h].tolist(), plan.run_len[b, h].tolist()
    join = _Joiner(max(map(sum, run_lengths)), k, v)
    outputs = []
    for tile, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length == 0:
            continue
        runs = [(s, n) for s, n in zip(run_starts[tile], run_lengths[tile], strict=True) if n > 0]
        if not runs:
            outputs.append(q.new_zeros(*q.shape[:2], length, v.shape[-1]))
            continue
        keys, values = join(runs)
        for row in range(start, start + length, MAX_TILE_ROWS):
            piece = q[:, :, row : min(row + MAX_TILE_ROWS, start + length)]
            outputs.append(F.scaled_dot_product_attention(piece, keys, values, scale=scale))
    return torch.cat(outputs, 2)


class _Joiner:
    """Brings the keys and values of some runs together: a view where there is one run, else a copy.

    Without gradients all copies go through one buffer: memory that is new for each tile costs more than the copy.
    """

    def __init__(self, longest: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.sources = (k, v)
        grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
        self.buffers = None if grad else [x.new_empty(*x.shape[:2], longest, x.shape[-1]) for x in (k, v)]

    def __call__(self, runs: list[tuple[int, int]]) -> list[torch.Tensor]:
        if len(runs) == 1:
            ((start, length),) = runs
            return [x[:, :, start : start + length] for x in self.sources]
        parts = [[x[:, :, start : start + length] for start, length in runs] for x in self.sources]
        if self.buffers is None:
            return [torch.cat(p, 2) for p in parts]
        total = sum(length for _, length in runs)
        return [torch.cat(p, 2, out=b[:, :, :total]) for p, b in zip(parts, self.buffers, strict=True)]
