"""The transformer of every family on a pretended GPU, with sparse attention in all of its layers."""

from __future__ import annotations

from typing import Any

import tiny_families
import torch
from torch.utils._pytree import tree_map

from vidaccel import DenseSchedule, Tangent
from vidaccel.pipelines import accelerate

from . import PretendedGPU, pretended_gpu

METHOD = Tangent(density=0.9, q_clusters=3, k_clusters=4, probe=True, schedule=DenseSchedule())

# What q and k are checked for once a step. A transformer alone is at the first step of a new run each time.
ONCE = "call_checks.py finite"


def run(names: list[str]) -> list[dict[str, Any]]:
    """Three passes of each, of which the first ones may read masks and coordinates.

    Returns:
        `name`, `waits` of the third pass beyond those of the model itself, and `launches` and `problems` of all, as
        `PretendedGPU.seen` gives them.
    """
    return [_family(name) for name in names]


def _family(name: str) -> dict[str, Any]:
    tiny = tiny_families.build(name)
    with pretended_gpu() as gpu, torch.no_grad():
        model = tiny.model.to("cuda")
        given = tree_map(lambda x: x.to("cuda") if isinstance(x, torch.Tensor) else x, tiny.given)
        stock = _waits(gpu, model, given)
        gpu.forget()
        with accelerate(model, METHOD, backend="triton"):
            for _ in range(2):
                model(**given, return_dict=False)
            waits = [wait for wait in _waits(gpu, model, given) if wait not in stock]
            own = [wait for wait in waits if ONCE not in wait]
        return {"name": name, **gpu.seen(), "waits": own}


def _waits(gpu: PretendedGPU, model: torch.nn.Module, given: dict[str, Any]) -> list[str]:
    gpu.tensors.waits.clear()
    model(**given, return_dict=False)
    return list(gpu.tensors.waits)
