"""The oracle: exact attention over any plan, in torch, a chunk of queries at a time."""

from __future__ import annotations

import torch

from ..groups import group_product
from ..orders import permute, unpermute
from ..plan import BlockPlan
from ..runs import expand_runs
from .base import ANY_HEAD_DIM, EVERYWHERE, Backend, Capability, without_autocast


class ReferenceBackend(Backend):
    """Masked softmax in at least float32. Right for every plan, fast for none: it computes all pairs and masks them."""

    name = "reference"
    summary = "exact masked softmax in float32 or better; the oracle, not for speed"
    capability = Capability(
        devices=EVERYWHERE,
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        max_head_dim=ANY_HEAD_DIM,
        lse=EVERYWHERE,
        backward=EVERYWHERE,
        sparse=True,
    )

    def __init__(self, rows: int = 128) -> None:
        self.rows = rows  # queries a chunk: memory is O(rows * n_kv) for each batch and head

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if torch.is_autocast_enabled(q.device.type):
            return without_autocast(self.attend, q, k, v, plan, scale, return_lse)
        wide = torch.promote_types(q.dtype, torch.float32)
        queries = permute(q, plan.q_order).to(wide) * scale
        keys, values = permute(k, plan.kv_order).to(wide), permute(v, plan.kv_order).to(wide)
        tiles = plan.tile_of_query().unsqueeze(-1)
        outputs, sums = [], []
        for start in range(0, plan.n_q, self.rows):
            rows = slice(start, start + self.rows)
            run_start, run_len = (_take(x, tiles[:, :, rows]) for x in (plan.run_start, plan.run_len))
            allowed = expand_runs(run_start, run_len, plan.n_kv)
            scores = group_product(queries[:, :, rows], keys.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
            lse = scores.logsumexp(-1, keepdim=True)
            # A row without keys has an LSE of -inf: exp(-inf - 0) gives it weights of 0 instead of NaN.
            weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
            outputs.append(group_product(weights, values))
            sums.append(lse.squeeze(-1))
        out = unpermute(torch.cat(outputs, 2), plan.q_order).to(q.dtype)
        return out, unpermute(torch.cat(sums, 2), plan.q_order).float() if return_lse else None


def _take(runs: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """The runs `[Bp, Hp, rows, R]` of the tile of each row."""
    return runs.gather(2, tiles.expand(*tiles.shape[:3], runs.shape[-1]))
