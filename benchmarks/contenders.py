"""What `attention.py` compares: our backends, torch's dense kernels, and whichever other packages are there."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from vidaccel import BlockPlan

PV_THRESHOLD = 8.0  # weights below exp(-8) of the best are left out

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One implementation in the comparison.

    Args:
        name: in the table.
        sparse: takes a plan; else it computes every pair.
        ours: False for what others wrote, the baselines.
        bind: from q, k, v `[B, H, N, D]` and a plan to a call without arguments that returns `[B, H, N, D]`. Raises
            where it cannot run. Rearranging inputs to a package's own layout happens here and is not timed.
        backward: gradients flow.
    """

    name: str
    sparse: bool
    ours: bool
    bind: Callable[[Tensors, BlockPlan | None], Callable[[], torch.Tensor]]
    backward: bool = True


def contenders(device: torch.device) -> Iterator[Contender]:
    """Everything that is installed; whether it runs a shape shows when it is tried."""
    kernels = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    if device.type == "cuda":
        kernels["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    else:
        del kernels["cudnn"]
    for name, kernel in kernels.items():
        yield Contender(f"sdpa {name}", sparse=False, ours=False, bind=_sdpa(kernel))
    yield Contender("flex", sparse=True, ours=False, bind=_backend("flex"), backward=device.type == "cuda")
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        yield Contender("triton", sparse=True, ours=True, bind=_backend("triton"))
        yield Contender("triton int8", sparse=True, ours=True, bind=_backend("triton", qk="int8"), backward=False)
        yield Contender("triton second stage", sparse=True, ours=True, bind=_second_stage, backward=False)
    if device.type == "cpu":
        yield Contender("gather", sparse=True, ours=True, bind=_backend("gather"))
    for package, sparse, bind in (
        ("flash_attn", False, _flash_attn),
        ("flashinfer", False, _flashinfer),
        ("sageattention", False, _sageattention),
        ("spas_sage_attn", True, _spas_sage_attn),
    ):
        if importlib.util.find_spec(package):
            yield Contender(package, sparse=sparse, ours=False, bind=bind, backward=package == "flash_attn")


def _sdpa(kernel: SDPBackend):
    def bind(tensors: Tensors, plan: BlockPlan | None) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(*tensors)

        return call

    return bind


def _backend(name: str, **options: str):
    def bind(tensors: Tensors, plan: BlockPlan) -> Callable[[], torch.Tensor]:
        from vidaccel import sparse_attention

        return lambda: sparse_attention(*tensors, plan, backend=name, **options)

    return bind


def _second_stage(tensors: Tensors, plan: BlockPlan) -> Callable[[], torch.Tensor]:
    """What the branch costs and saves; random tokens see all keys alike, so at worst it saves nothing."""
    return _backend("triton")(tensors, replace(plan, pv_threshold=PV_THRESHOLD))


def _flash_attn(tensors: Tensors, plan: BlockPlan | None) -> Callable[[], torch.Tensor]:
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors)
    return lambda: flash_attn_func(q, k, v).transpose(1, 2)


def _flashinfer(tensors: Tensors, plan: BlockPlan | None) -> Callable[[], torch.Tensor]:
    from flashinfer import single_prefill_with_kv_cache

    if tensors[0].shape[0] != 1:
        raise ValueError("flashinfer's single prefill takes one batch entry")
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in tensors)
    return lambda: single_prefill_with_kv_cache(q, k, v).transpose(0, 1).unsqueeze(0)


def _sageattention(tensors: Tensors, plan: BlockPlan | None) -> Callable[[], torch.Tensor]:
    from sageattention import sageattn

    return lambda: sageattn(*tensors, tensor_layout="HND", is_causal=False)


def _spas_sage_attn(tensors: Tensors, plan: BlockPlan) -> Callable[[], torch.Tensor]:
    # It chooses its own blocks: only the share of them is that of the plan, so its error is not comparable.
    from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda

    density = plan.density()
    return lambda: spas_sage2_attn_meansim_topk_cuda(*tensors, topk=density, is_causal=False)
