"""Compiled FlexAttention: a generic sparse kernel that torch generates for the device at hand."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable

import torch

from ..block_mask import to_block_mask
from ..own_kernels import INSTALL_TRITON, has_triton
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
        if reason is None and device.type == "cpu":
            # What torch demands of a CPU when it lowers FlexAttention, asked before a run instead of in its middle.
            if sys.platform == "darwin" or not _avx2():
                reason = "needs a CPU with AVX2, and not macOS"
            elif not _cpp_compiler():
                reason = "needs a C++ compiler on the CPU and found none (install g++ or set CXX)"
            elif " " in torch.__file__:
                # torch passes the folder of its libraries to the linker unquoted.
                reason = f"cannot be compiled with a space in the path of torch ({os.path.dirname(torch.__file__)})"
        if reason is None and device.type == "cuda" and not has_triton():
            reason = f"needs triton, which is not installed: {INSTALL_TRITON}"
        return reason

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


@functools.cache
def _cpp_compiler() -> bool:
    named = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in [*named[:1], "g++", "clang++", "c++"])


def _avx2() -> bool:
    """Whether torch uses AVX2 or more; ATEN_CPU_CAPABILITY=default switches it off."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
