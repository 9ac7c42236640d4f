"""Every way in which diffusers and accelerate keep the weights of a transformer elsewhere, on a machine with a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import cpu_offload, cpu_offload_with_hook

CPU = torch.device("cpu")
STREAM = SimpleNamespace(synchronize=lambda: None)


def _grouped(transformer, streamed: bool = False, **options) -> None:
    transformer.enable_group_offload(CPU, CPU, **options)
    for module in transformer.modules() if streamed else ():
        hook = module._diffusers_hook.get_hook("group_offloading") if hasattr(module, "_diffusers_hook") else None
        if hook is not None:
            on_a_stream(hook.group)


def on_a_stream(group) -> None:
    """Have a `ModuleGroup` copy its weights as it does on a stream of a GPU."""
    group.stream, group.low_cpu_mem_usage, group.non_blocking = STREAM, True, True
    group.cpu_param_dict = group._init_cpu_param_dict()
    group._pinned_memory_tensors = lambda: contextlib.nullcontext(group.cpu_param_dict)
    current = SimpleNamespace(stream=lambda stream: contextlib.nullcontext(), current_stream=lambda: STREAM)
    group._torch_accelerator_module = current


BLOCKS = {"offload_type": "block_level", "num_blocks_per_group": 1}
LEAVES = {"offload_type": "leaf_level"}
WAYS: dict[str, Callable[[torch.nn.Module, Path], object]] = {
    "whole": lambda transformer, folder: cpu_offload_with_hook(transformer, CPU),
    "sequential": lambda transformer, folder: cpu_offload(transformer, CPU, offload_buffers=True),
    "blocks": lambda transformer, folder: _grouped(transformer, **BLOCKS),
    "leaves": lambda transformer, folder: _grouped(transformer, **LEAVES),
    "blocks streamed": lambda transformer, folder: _grouped(transformer, True, **BLOCKS),
    "leaves streamed": lambda transformer, folder: _grouped(transformer, True, **LEAVES),
    "blocks on disk": lambda transformer, folder: _grouped(transformer, offload_to_disk_path=str(folder), **BLOCKS),
    "leaves on disk": lambda transformer, folder: _grouped(transformer, offload_to_disk_path=str(folder), **LEAVES),
}
