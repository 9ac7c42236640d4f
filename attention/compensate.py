"""Centroid compensation: attention over what stands for the keys that a plan skips."""

from __future__ import annotations

import torch

from .plan import BlockPlan

SCORES = 2**26  # scores held at once, over all heads: a quarter of a GiB


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
