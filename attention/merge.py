"""Attention with its log-sum-exp, and two such results over disjoint keys joined as if one softmax had seen both."""

from __future__ import annotations

import torch


def attend_scores(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax over scores, applied to values; a row of -inf gives 0 and -inf, not NaN.

    Args:
        scores: `[..., R, K]` scaled, -inf where a query does not read a key.
        values: `[..., K, D]`.

    Returns:
        `([..., R, D], log-sum-exp [..., R])`.
    """
    # The result does not depend on what is subtracted, so neither do the gradients.
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    # Not the log of 0, whose gradient is not a number even where nothing comes of it.
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return weights @ values / total, (top + total.log()).masked_fill(empty, -torch.inf).squeeze(-1)


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over two disjoint sets of keys from the attention over each.

    With Z the sum of the exponentials of a row's scores, `lse = log Z` and the joint output is the mean of both outputs
    weighted by Z. Computed in float32 or better, relative to the larger log-sum-exp, so that nothing overflows; a row
    without keys (output 0, log-sum-exp -inf) adds nothing. Differentiable in all four arguments.

    Args:
        out_a, out_b: `[B, H, N, D]`, outputs over the two sets of keys.
        lse_a, lse_b: `[B, H, N]`, natural log-sum-exp of the scaled scores.

    Returns:
        `[B, H, N, D]` in the dtype of the outputs, and `[B, H, N]` in that of the log-sum-exps.

    Raises:
        ValueError: shapes, dtypes or devices that disagree.
    """
    if out_a.shape != out_b.shape or lse_a.shape != out_a.shape[:-1] or lse_b.shape != out_a.shape[:-1]:
        raise ValueError(
            "merge needs two outputs [B, H, N, D] of one shape and two log-sum-exps [B, H, N], got "
            f"{tuple(out_a.shape)}, {tuple(lse_a.shape)}, {tuple(out_b.shape)}, {tuple(lse_b.shape)}."
        )
    if out_a.dtype != out_b.dtype or lse_a.dtype != lse_b.dtype:
        raise ValueError(
            f"merge needs outputs of one dtype and log-sum-exps of one dtype, got {out_a.dtype} and {out_b.dtype}, "
            f"{lse_a.dtype} and {lse_b.dtype}; cast them first."
        )
    if len({x.device for x in (out_a, lse_a, out_b, lse_b)}) > 1:
        raise ValueError(f"merge needs everything on one device, got outputs on {out_a.device} and {out_b.device}.")
    wide = torch.promote_types(torch.promote_types(out_a.dtype, lse_a.dtype), torch.float32)
    first, second = lse_a.to(wide), lse_b.to(wide)
    # The result does not depend on what is subtracted, so neither do the gradients. Two rows of -inf must not meet as
    # -inf minus -inf.
    top = torch.maximum(first, second).detach()
    top = top.masked_fill(top == float("-inf"), 0.0)
    first, second = (first - top).exp(), (second - top).exp()
    total = first + second
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out = (first / total).unsqueeze(-1) * out_a + (second / total).unsqueeze(-1) * out_b
    lse = (top + total.log()).masked_fill(empty, float("-inf"))
    return out.to(out_a.dtype), lse.to(lse_a.dtype)
