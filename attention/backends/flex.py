"""Compiled FlexAttention: a generic sparse kernel that torch generates for the device at hand."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from .. import code_generator
from ..block_mask import to_block_mask
from ..orders import permute, unpermute
from ..plan import BlockPlan
from .base import Backend, Capability, Precision

logger = logging.getLogger(__name__)

# Flex compiles one kernel per set of shapes. torch's own limit of 8 is passed by a few resolutions and cluster counts,
# and what it does then (run eagerly, that is densely) is what this backend must never do. Texts of ever other lengths
# pass any limit: then the kernels so far are given up.
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
        grouped = queries.shape[1] != keys.shape[1]
        out, lse = _compiled(queries, keys, values, mask, scale, return_lse, grouped)
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


def _compiled(*call: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`_flex_attention` under `torch.compile`; at the limit of shapes, torch raises, and its kernels are made anew."""
    from torch._dynamo.eval_frame import remove_from_cache
    from torch._dynamo.exc import FailOnRecompileLimitHit

    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_SHAPES):
        try:
            return compiled_flex_attention()(*call)
        except FailOnRecompileLimitHit:
            logger.warning(
                "FlexAttention was compiled for %d shapes, as many as are kept: it forgets them, and compiles those "
                "that come again anew",
                MAX_COMPILED_SHAPES,
            )
            remove_from_cache(_flex_attention)
            return compiled_flex_attention()(*call)


@functools.cache
def compiled_flex_attention() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """FlexAttention under `torch.compile`. `fullgraph` turns every way back to eager into an error."""
    return torch.compile(_flex_attention, fullgraph=True, dynamic=False)


def _flex_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: Any,
    scale: float,
    return_lse: bool,
    enable_gqa: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from torch.nn.attention.flex_attention import flex_attention

    options: dict[str, Any] = {"block_mask": block_mask, "scale": scale, "enable_gqa": enable_gqa}
    if return_lse:
        return flex_attention(q, k, v, **options, return_lse=True)
    return flex_attention(q, k, v, **options), None


def _avx2() -> bool:
    """Whether torch uses AVX2 or more; ATEN_CPU_CAPABILITY=default switches it off."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
