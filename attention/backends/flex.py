"""Compiled FlexAttention: a generic sparse kernel that torch generates for the device at hand."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch

from .. import code_generator
from ..block_mask import to_block_mask
from ..plan import BlockPlan, permute, unpermute
from .base import Backend, Capability, Precision

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
        if reason is None and device.type == "cpu" and (sys.platform == "darwin" or not _avx2()):
            reason = "needs a CPU with AVX2, and not macOS"  # torch does, when it lowers FlexAttention
        return reason or code_generator.missing(device)

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, precision: Precision) -> None:
        to_block_mask(plan, block_size(plan))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = to_block_mask(plan, block_size(plan))
        queries, keys, values = permute(q, plan.q_order), permute(k, plan.kv_order), permute(v, plan.kv_order)
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SHAPES):
            grouped = queries.shape[1] != keys.shape[1]
            out, lse = compiled_flex_attention()(queries, keys, values, mask, scale, return_lse, grouped)
        return unpermute(out, plan.q_order), None if lse is None else unpermute(lse, plan.q_order)


def block_size(plan: BlockPlan) -> tuple[int, int]:
    """FlexAttention's `(queries, keys)` block: 128 on CUDA, whose kernels need it; on the CPU the plan's own blocks, so
    that none is partly covered, or large ones for bands, whose masks are then quick to build, and small
    ones for scattered runs, where the share of partly covered blocks decides."""
    if plan.device.type != "cpu":
        return 128, 128
    if plan.block is not None:
        return plan.block
    return (128, 128) if not plan.is_scattered else (64, 64) if plan.n_q >= 2048 else (32, 32)


@functools.cache
def compiled_flex_attention() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """FlexAttention under `torch.compile`. `fullgraph` turns every way back to eager into an error."""
    from torch.nn.attention.flex_attention import flex_attention

    def call(q, k, v, block_mask, scale, return_lse, enable_gqa):
        options = {"block_mask": block_mask, "scale": scale, "enable_gqa": enable_gqa}
        if return_lse:
            return flex_attention(q, k, v, **options, return_lse=True)
        return flex_attention(q, k, v, **options), None

    return torch.compile(call, fullgraph=True, dynamic=False)


def _avx2() -> bool:
    """Whether torch uses AVX2 or more; ATEN_CPU_CAPABILITY=default switches it off."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
