"""The project's own Triton kernels: ragged and uniform plans alike, forward and backward."""

from __future__ import annotations

import os

import torch

from ..own_kernels import INSTALL_TRITON, MOST_CHANNELS, gpu_lacks, has_triton
from ..plan import BlockPlan
from .base import AS_INPUTS, Backend, Capability, Precision, Request

FP8_COMPUTE_CAPABILITY = (8, 9)
# Where the compiled kernel is slower with values in fp8 than with those of the model: it needs them transposed in
# shared memory, and products wait for one another (ptxas C7514): 720 instructions for 64 keys against 425.
FP8_DOES_NOT_PAY = 9  # major compute capability


class TritonBackend(Backend):
    """Computes the pairs of the plan, rounded up to tiles of keys at the end of each run.

    On the CPU it runs only in Triton's interpreter (environment variable `TRITON_INTERPRET=1`, set before the first
    import of triton), which is for tests, and slow.

    Args:
        gather_kv: read keys and values through the plan's `kv_order` in the kernel, instead of copying them in order
            first. That saves the memory of one more k and v, and gives up the copy engine of newer GPUs.
    """

    name = "triton"
    summary = "own Triton kernels, forward and backward, ragged and uniform plans"
    capability = Capability(
        devices=("cuda", "cpu"),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        max_head_dim=MOST_CHANNELS,
        lse=("cuda", "cpu"),
        backward=("cuda", "cpu"),
        sparse=True,
        qk=("int8",),
        pv=("fp8",),
        stand_ins=("cuda", "cpu"),
        second_stage=("cuda", "cpu"),
    )

    def __init__(self, gather_kv: bool = False) -> None:
        self.gather_kv = gather_kv

    def unavailable(self, device: torch.device) -> str | None:
        reason = super().unavailable(device)
        if reason is not None:
            return reason
        if not has_triton():
            return f"needs triton, which is not installed: {INSTALL_TRITON}"
        if device.type == "cpu":
            if os.environ.get("TRITON_INTERPRET") == "1":
                return None
            return (
                "runs on cuda; on the cpu only in Triton's interpreter, for tests: set TRITON_INTERPRET=1 before the "
                "first import of triton"
            )
        return gpu_lacks(device)

    def declines(self, request: Request) -> str | None:
        reason = super().declines(request)
        if reason is None and request.device.type == "cpu" and request.dtype == torch.bfloat16:
            return "takes float16 and float32 in Triton's interpreter, which computes bfloat16 products wrongly"
        if reason is None and request.precision.pv == "fp8":
            found = (0, 0) if request.device.type == "cpu" else _compute_capability(request.device)
            if found < FP8_COMPUTE_CAPABILITY:
                here = "this is the cpu" if found == (0, 0) else f"this one has {found[0]}.{found[1]}"
                return f'takes pv="fp8" on GPUs of compute capability 8.9 or higher, and {here}; leave pv out'
            if found[0] == FP8_DOES_NOT_PAY:
                return (
                    'does not take pv="fp8" on Hopper, where it is slower than without: 720 instructions for 64 keys '
                    "against 425, and products that wait for one another; leave pv out"
                )
        if reason is None and request.second_stage and request.precision.pv is not None:
            return f"leaves out no tiles (pv_threshold) with {request.precision}: leave pv out"
        return reason

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, precision: Precision) -> None:
        from ..kernels.block_sparse import backward_walk_of, walk_of
        from ..kernels.block_sparse_int8 import int8_walk_of
        from ..kernels.walk import stream_of

        if torch.compiler.is_compiling():
            return  # the operator has them made, into which a compiled graph does not look
        if stream_of(q.device) is None:
            return  # nothing is kept then (`walk.kept_on`): they would be in the graph twice
        if precision == AS_INPUTS:
            walk_of(plan, q)
            backward_walk_of(plan, q, k, v)
        else:
            int8_walk_of(plan, q, _key_block(plan), precision.pv == "fp8")

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from ..kernels.block_sparse import backward_walk_of, block_sparse_attention, walk_of
        from ..kernels.stand_ins import stand_ins_of

        stand_ins = (None, None, None) if plan.skipped is None else stand_ins_of(plan, q.dtype)
        # A compiled graph has them made in the operator, into which it does not look.
        compiled = torch.compiler.is_compiling()
        out, lse = block_sparse_attention(
            q,
            k,
            v,
            plan.tile_start,
            plan.tile_len,
            plan.run_start,
            plan.run_len,
            plan.q_order,
            plan.kv_order,
            [] if compiled else walk_of(plan, q),
            [] if compiled else backward_walk_of(plan, q, k, v),
            float(scale),
            self.gather_kv,
            *stand_ins,
            plan.pv_threshold,
        )
        return out, lse if return_lse else None

    def scales_of(self, q: torch.Tensor, plan: BlockPlan, precision: Precision) -> str:
        from ..kernels.block_sparse_int8 import int8_tiles

        _, keys = int8_tiles(q, plan.tile_len, _key_block(plan), precision.pv == "fp8")
        return f"with a scale for each token of Q and {keys} keys" if keys else super().scales_of(q, plan, precision)

    def attend_quantized(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        plan: BlockPlan,
        scale: float,
        return_lse: bool,
        precision: Precision,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from ..kernels.block_sparse_int8 import block_sparse_attention_int8, int8_walk_of
        from ..kernels.stand_ins import stand_ins_of

        fp8 = precision.pv == "fp8"
        own = plan.skipped is not None and self.takes_stand_ins(q.device, precision)  # else they are merged later
        out, lse = block_sparse_attention_int8(
            q,
            k,
            v,
            plan.tile_start,
            plan.tile_len,
            plan.run_start,
            plan.run_len,
            plan.q_order,
            plan.kv_order,
            [] if torch.compiler.is_compiling() else int8_walk_of(plan, q, _key_block(plan), fp8),
            float(scale),
            self.gather_kv,
            fp8,
            _key_block(plan),
            *(stand_ins_of(plan, q.dtype) if own else (None, None, None)),
            plan.pv_threshold,
        )
        return out, lse if return_lse else None


def _key_block(plan: BlockPlan) -> int:
    """Keys of which all runs start at multiples; 0 where that is not known."""
    return 0 if plan.block is None else plan.block[1]


def _compute_capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor
