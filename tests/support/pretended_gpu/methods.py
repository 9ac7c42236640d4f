"""Every method of attention on a pretended GPU: plans, the forward pass in each precision, the backward pass."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from vidaccel import LVSA, SLA, SVG, SVG2, VSA, Radial, Sparge, Tangent, VideoLayout
from vidaccel.attention import BlockPlan, Method, PlanMemory
from vidaccel.attention.backends.base import AS_INPUTS, Precision
from vidaccel.attention.backends.triton import TritonBackend
from vidaccel.attention.kernels import block_sparse
from vidaccel.attention.kernels.stand_ins import stand_ins_of

from . import PretendedGPU, pretended_gpu

LAYOUT = VideoLayout(5, 16, 16, text_before=3, text_after=77)
FP8_ON = (8, 9), (10, 0), (12, 0)  # on Hopper it does not pay, and is refused
STEPS = 4  # clusters are renewed in some and kept in others

METHODS: dict[str, Method] = {
    "radial": Radial.for_density(LAYOUT, 0.4),
    "lvsa": LVSA(),
    "svg": SVG(),
    "svg2": SVG2(init_iterations=3),
    "svg2, compensated": SVG2(density=0.4, compensate=True, init_iterations=3),
    "svg2, error route": SVG2(density=0.4, compensate=True, route="error", init_iterations=3),
    "tangent": Tangent(density=0.4, init_iterations=3),
    "tangent, tolerance": Tangent(tolerance=0.1, init_iterations=3),
    "tangent, probe-free": Tangent(density=0.4, probe=False, init_iterations=3),
    "sparge": Sparge(topk=0.3),
    "sparge, cdf": Sparge(cdf=0.9, similarity=0.5, sink=True),
    "sla": SLA(topk=0.3),
    "vsa": VSA(density=0.3, gated=False),
}


def run(capability: tuple[int, int], compile: bool = False, heads: tuple[int, int] = (6, 2)) -> list[dict[str, Any]]:
    """Each method in `STEPS` steps and in every way to compute, with what was seen.

    Args:
        capability: of the GPU. compile: see `pretended_gpu`.
        heads: of queries, and of keys and values.

    Returns:
        For each method and way `name`, and what `PretendedGPU.seen` gives; for each method also `late`: the kernels of
        which a variant was new in the last two steps.
    """
    capability = (capability[0], capability[1])  # JSON has lists
    with pretended_gpu(capability, compile) as gpu:
        return [result for name, method in METHODS.items() for result in _method(gpu, name, method, heads, capability)]


def _method(
    gpu: PretendedGPU, name: str, method: Method, heads: tuple[int, int], capability: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    memory, gpu_backend = PlanMemory(), TritonBackend()
    gpu.forget()
    early: dict[str, int] = {}
    for step in range(STEPS):
        if step == STEPS - 2:
            early = dict(gpu.launches.variants)
        q, k, v = (_tokens(count) for count in (heads[0], heads[1], heads[1]))
        plan = method.plan(q, k, v, LAYOUT, memory)
        gpu_backend.prepare(q, k, v, plan, AS_INPUTS)
        out, _ = gpu_backend.attend(q, k, v, plan, 0.1, False)
        assert out.shape == q.shape and out.device == q.device
    late = [kernel for kernel, count in gpu.launches.variants.items() if count > early.get(kernel, 0)]
    yield {"name": name, "late": late, **gpu.seen()}
    for way, compute in _ways(capability).items():
        gpu.forget()
        compute(gpu_backend, q, k, v, plan)
        yield {"name": f"{name}: {way}", **gpu.seen()}


def _tokens(heads: int) -> torch.Tensor:
    """As projections leave them: the heads of a token side by side."""
    return torch.empty(2, LAYOUT.tokens, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def _ways(capability: tuple[int, int]) -> dict[str, Callable[..., None]]:
    ways: dict[str, Callable[..., None]] = {"second stage": _second_stage, "int8": _int8, "backward": _backward}
    if capability in FP8_ON:
        ways["int8 and fp8"] = _fp8
    return ways


def _second_stage(backend: TritonBackend, q: Any, k: Any, v: Any, plan: BlockPlan) -> None:
    backend.attend(q, k, v, replace(plan, pv_threshold=10.0), 0.1, False)


def _int8(backend: TritonBackend, q: Any, k: Any, v: Any, plan: BlockPlan, pv: Any = None) -> None:
    precision = Precision(qk="int8", pv=pv)
    backend.prepare(q, k, v, plan, precision)
    backend.attend_quantized(q, k, v, plan, 0.1, False, precision)


def _fp8(backend: TritonBackend, q: Any, k: Any, v: Any, plan: BlockPlan) -> None:
    _int8(backend, q, k, v, plan, "fp8")


def _backward(backend: TritonBackend, q: Any, k: Any, v: Any, plan: BlockPlan) -> None:
    """By the functions that autograd calls, which itself does not run without a GPU."""
    stand_ins = (None, None, None) if plan.skipped is None else stand_ins_of(plan, q.dtype)
    tables = (plan.tile_start, plan.tile_len, plan.run_start, plan.run_len, plan.q_order, plan.kv_order)
    given = (q, k, v, *tables, [], block_sparse.backward_walk(plan, q), 0.1, False, *stand_ins, None)
    out, lse = block_sparse.block_sparse_attention(*given)
    context = types.SimpleNamespace()
    context.save_for_backward = lambda *saved: setattr(context, "saved_tensors", saved)
    block_sparse._save(context, given, (out, lse))
    grads = block_sparse._backward(context, torch.empty_like(out), torch.empty_like(lse))
    assert all(grad.shape == x.shape and grad.device == x.device for grad, x in zip(grads, (q, k, v), strict=False))
