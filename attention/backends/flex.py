"""Compiled FlexAttention: a generic sparse kernel that torch generates for the device at hand."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch

from ..plan import BlockPlan, permute, unpermute
from .base import Backend, Capability

# Flex compiles one kernel per set of shapes. torch's own limit of 8 is passed by a few resolutions and cluster counts,
# and what it does then (run eagerly, that is densely) is what this backend must never do.
MAX_COMPILED_SHAPES = 64


class FlexBackend(Backend):
    """Skips whole blocks that the plan does not touch and masks the ones it touches in part.

    It is always compiled: eager FlexAttention computes every pair and masks, so a sparse plan would cost more than
    dense attention. The first call of each shape therefore pays a compilation.
    """

    name = "flex"
    summary = "compiled FlexAttention; the first call of a shape compiles"
    capability = Capability(
        devices=("cpu", "cuda"),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        max_head_dim=256,
        lse=("cuda",),
        backward=("cuda",),
        sparse=True,
    )

    def unavailable(self, device: torch.device) -> str | None:
        reason = super().unavailable(device)
        if reason is None and device.type == "cpu" and not _cpp_compiler():
            return "needs a C++ compiler on the CPU and found none (install g++ or set CXX)"
        return reason

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = plan.to_block_mask(block_size(plan, q.device))
        queries, keys, values = permute(q, plan.q_order), permute(k, plan.kv_order), permute(v, plan.kv_order)
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SHAPES):
            out, lse = compiled_flex_attention()(queries, keys, values, mask, scale, return_lse)
        return unpermute(out, plan.q_order), None if lse is None else unpermute(lse, plan.q_order)


def block_size(plan: BlockPlan, device: torch.device) -> tuple[int, int]:
    """FlexAttention's `(queries, keys)` block: 128 on CUDA, whose kernels need it; on the CPU the plan's own blocks, so
    that none is partly covered, or small ones for ragged plans, where the share of partly covered blocks decides."""
    if device.type == "cuda":
        return 128, 128
    if plan.block is not None:
        return plan.block
    return (64, 64) if plan.n_q >= 2048 else (32, 32)


@functools.cache
def compiled_flex_attention() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """FlexAttention under `torch.compile`. `fullgraph` turns every way back to eager into an error."""
    from torch.nn.attention.flex_attention import flex_attention

    def call(q, k, v, block_mask, scale, return_lse):
        if return_lse:
            return flex_attention(q, k, v, block_mask=block_mask, scale=scale, return_lse=True)
        return flex_attention(q, k, v, block_mask=block_mask, scale=scale), None

    return torch.compile(call, fullgraph=True, dynamic=False)


@functools.cache
def _cpp_compiler() -> bool:
    import os

    named = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in [*named[:1], "g++", "clang++", "c++"])
