"""Centroid compensation: what a plan skips enters attention as one key and one value per cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .plan import BlockPlan

SCORES = 2**26  # scores held at once, over all heads: a quarter of a GiB


@dataclass(frozen=True, eq=False)
class SkippedClusters:
    """The mean key and the mean value of each key cluster of a `BlockPlan` made from clusters.

    A tile reads the clusters it selects token by token, and each of the others as one key that counts as often as the
    cluster has tokens: `size * exp(q . mean k)` stands for the sum of `exp(q . k)`. By Jensen's inequality that is
    never too much; it is exact where the keys of a cluster are equal. (SVG2's selection uses the same estimate;
    attending to it is what SVG-EAR, July 2026, calls centroid compensation.)

    Args:
        k_mean, v_mean: `[B, H, C, D]` float32, in the order of the plan's `selection`.
    """

    k_mean: torch.Tensor
    v_mean: torch.Tensor

    def to(self, device: torch.device | str) -> SkippedClusters:
        """The same on another device."""
        return SkippedClusters(self.k_mean.to(device), self.v_mean.to(device))


def attend_skipped(q: torch.Tensor, plan: BlockPlan, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the mean keys of the clusters that each query does not read.

    Args:
        q: `[B, H, n_q, D]`, not permuted.
        plan: with `selection` and `skipped`.
        scale: multiplies the scores.

    Returns:
        `([B, H, n_q, D] in the dtype of q, [B, H, n_q] float32)`, output and log-sum-exp, to be merged with those over
        the selected keys. Gradients flow to `q` alone: the means belong to the plan.
    """
    batch, heads, queries, _ = q.shape
    selected, sizes = plan.selection
    skipped = ~selected & (sizes > 0).unsqueeze(-2)
    bias = sizes.float().log().unsqueeze(-2).masked_fill(~skipped, -torch.inf).expand(batch, heads, -1, -1)
    tile = plan.tile_of_token().expand(batch, heads, -1)
    rows = max(1, SCORES // (batch * heads * bias.shape[-1]))
    outputs, sums = [], []
    for start in range(0, queries, rows):
        piece = slice(start, start + rows)
        own = tile[:, :, piece, None].expand(-1, -1, -1, bias.shape[-1])
        scores = (q[:, :, piece].float() * scale) @ plan.skipped.k_mean.transpose(-1, -2) + bias.gather(2, own)
        lse = scores.logsumexp(-1)
        # A query that reads every cluster has no scores but -inf: its weights must be 0 and not NaN.
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
        outputs.append((weights @ plan.skipped.v_mean).to(q.dtype))
        sums.append(lse)
    return torch.cat(outputs, 2), torch.cat(sums, 2)
