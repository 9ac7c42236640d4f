"""What `quantize.py` and `block_sparse_int8.py` compute, in plain torch, for the tests to compare with."""

from __future__ import annotations

import math

import torch

from ..plan import BlockPlan


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x [B, H, N, D]` float32 to int8, rounded half up, and scales `[B, H, N]`."""
    largest = x.abs().amax(-1).clamp(min=1e-30)
    return (x * (127.0 / largest).unsqueeze(-1) + 0.5).floor().to(torch.int8), largest / 127.0


def quantize_blocks(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`x [B, H, N, D]` float32 to int8 with one scale for `block` tokens each, repeated for them: `[B, H, N]`."""
    largest = torch.stack([some.abs().amax((-1, -2)) for some in x.split(block, 2)], -1).clamp(min=1e-30)
    largest = largest.repeat_interleave(block, -1)[..., : x.shape[2]]
    return (x * (127.0 / largest).unsqueeze(-1) + 0.5).floor().to(torch.int8), largest / 127.0


def dequantize_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Undo `quantize_rows`, in float64."""
    return x.double() * scale.double().unsqueeze(-1)


def quantize_channels(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`v [B, H, N, D]` to float8_e4m3fn and scales `[B, H, D]` float32."""
    largest = v.abs().amax(2).float().clamp(min=1e-30)
    return (v.float() * (448.0 / largest).unsqueeze(2)).to(torch.float8_e4m3fn), largest / 448.0


def int8_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    *,
    smooth: bool = True,
    fp8_values: bool = False,
    k_block: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention through the dense mask of the plan, in float64, from quantised q and k.

    Args:
        q: `[B, H, n_q, D]`. k, v: `[B, H, n_kv, D]`. plan: at most a few hundred tokens long.
        scale: multiplies the scores.
        smooth: take the mean over all keys from each key first; without it int8 is much worse where K has an offset.
        fp8_values: also round v to fp8; the weights are not rounded here.
        k_block: keys in a row, in permuted order, that share a scale; each has its own when 0. For plans without an
            order of keys.

    Returns:
        `[B, H, n_q, D]` and the log-sum-exp of the unsmoothed scores `[B, H, n_q]`, both float64.
    """
    mean = k.mean(2, keepdim=True, dtype=torch.float32) * smooth
    queries = quantize_rows(q.float() * (scale * math.log2(math.e)))
    keys = quantize_blocks(k.float() - mean, k_block) if k_block else quantize_rows(k.float() - mean)
    scores = dequantize_rows(*queries) @ dequantize_rows(*keys).transpose(-1, -2) * math.log(2.0)
    scores = scores.masked_fill(~plan.to_dense_mask(), -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    if fp8_values:
        values, channel = quantize_channels(v)
        v = values.double() * channel.double().unsqueeze(2)
    shift = (q.double() @ mean.double().transpose(-1, -2)).squeeze(-1) * scale
    return weights @ v.double(), scores.logsumexp(-1) + shift
