"""Dense attention of each query tile over its gathered runs of keys: any plan without a compiler."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..plan import BlockPlan, permute, unpermute
from .base import ANY_HEAD_DIM, EVERYWHERE, Backend, Capability

MAX_TILE_ROWS = 256
FEW_ROWS = 192  # below it torch's CPU kernel works on 32 rows at a time, which halves the speed of its matrix products


class GatherBackend(Backend):
    """One `scaled_dot_product_attention` per query tile, over exactly the keys its runs name.

    Nothing is masked and nothing padded, so the pairs computed are the pairs of the plan, at the price of one call per
    tile: good on the CPU, where a call is cheap next to its work, slow on a GPU.
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
                some_q, some_k, some_v = (x[batch_slice, head_slice] for x in (queries, keys, values))
                row.append(_attend_tiles(some_q, some_k, some_v, plan, b, h, scale, return_lse))
            rows.append(_join(row, 1))
        out, lse = _join(rows, 0)
        return unpermute(out, plan.q_order), None if lse is None else unpermute(lse.unsqueeze(-1), plan.q_order)[..., 0]


Result = tuple[torch.Tensor, torch.Tensor | None]
"""Output `[B', H', rows, D]` and, where asked for, log-sum-exp `[B', H', rows]`."""


def _join(results: list[Result], dim: int) -> Result:
    if len(results) == 1:
        return results[0]
    outputs, sums = zip(*results, strict=True)
    return torch.cat(outputs, dim), None if sums[0] is None else torch.cat(sums, dim)


def _attend_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    b: int,
    h: int,
    scale: float,
    return_lse: bool,
) -> Result:
    """Attention of every tile of plan entry `(b, h)`."""
    starts, lengths = plan.tile_start[b, h].tolist(), plan.tile_len[b, h].tolist()
    run_starts, run_lengths = plan.run_start[b, h].tolist(), plan.run_len[b, h].tolist()
    join = _Joiner(max(map(sum, run_lengths)), q, k, v)
    results = []
    for tile, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length == 0:
            continue
        runs = [(s, n) for s, n in zip(run_starts[tile], run_lengths[tile], strict=True) if n > 0]
        if not runs:
            shape = (*q.shape[:2], length)
            lse = q.new_full(shape, -torch.inf, dtype=torch.float32) if return_lse else None
            results.append((q.new_zeros(*shape, v.shape[-1]), lse))
            continue
        keys, values = join(runs)
        for row in range(start, start + length, MAX_TILE_ROWS):
            piece = q[:, :, row : min(row + MAX_TILE_ROWS, start + length)]
            results.append(_attend(piece, keys, values, scale, return_lse))
    return _join(results, 2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, return_lse: bool) -> Result:
    """Dense attention of one tile on its keys."""
    one_head = q.shape[0] * q.shape[1] == 1  # else the scores of all heads would be too much memory
    exact = q.dtype in (torch.float32, torch.float64)  # half precision would need copies
    if return_lse or (q.device.type == "cpu" and q.shape[2] < FEW_ROWS and one_head and exact):
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
        out = (torch.softmax(scores, -1) @ v.to(wide)).to(q.dtype)
        return out, scores.logsumexp(-1).float() if return_lse else None
    return F.scaled_dot_product_attention(q, k, v, scale=scale), None


class _Joiner:
    """Brings the keys and values of some runs together: a view where there is one run, else a copy.

    Without gradients all copies go through one buffer: memory that is new for each tile costs more than the copy.
    """

    def __init__(self, longest: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.sources = (k, v)
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        self.buffers = None if grad else [x.new_empty(*x.shape[:2], longest, x.shape[-1]) for x in (k, v)]

    def __call__(self, runs: list[tuple[int, int]]) -> list[torch.Tensor]:
        if len(runs) == 1:
            ((start, length),) = runs
            return [x[:, :, start : start + length] for x in self.sources]
        parts = [_cut_out(x, runs) for x in self.sources]
        if self.buffers is None:
            return [torch.cat(p, 2) for p in parts]
        total = sum(length for _, length in runs)
        return [torch.cat(p, 2, out=b[:, :, :total]) for p, b in zip(parts, self.buffers, strict=True)]


def _cut_out(x: torch.Tensor, runs: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """The rows of each run, as views: one `split` for all of them, because a Python slice for each takes far longer."""
    sizes: list[int] = []
    at = 0
    for start, length in runs:
        sizes += (start - at, length)
        at = start + length
    return x.split([*sizes, x.shape[2] - at], 2)[1::2]
