"""Whole tensors from sharded ones and back, so that a checkpoint does not depend on how a model was spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of FSDP 2, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(value: Any, keep: bool = True) -> Any:
    """A copy on the CPU; of sharded tensors (FSDP 2) the whole, for which every process must call this.

    Args:
        value: a tensor, or nested mappings and lists of them.
        keep: False in a process that only takes part; it gets None for each tensor and copies nothing.
    """
    if isinstance(value, torch.Tensor):
        gathered: Any = value
        if is_sharded(value):
            gathered = gathered.full_tensor()
        return gathered.detach().to("cpu", copy=True) if keep else None
    if isinstance(value, Mapping):
        return {key: whole(entry, keep) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(entry, keep) for entry in value]
    return value


def all_finite(tensors: Iterable[Any]) -> bool:
    """Whether what this process holds of the tensors has neither NaN nor infinity."""
    parts = (tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors)
    checks = [part.detach().isfinite().all() for part in parts]
    return not checks or bool(torch.stack([check.to(checks[0].device) for check in checks]).all())


def copy_whole(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    with torch.no_grad():
        target.copy_(_like(source, target))


def optimizer_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """What `whole` made of an optimiser's state, sharded as its parameters are (in the order of its groups)."""
    numbered = {}
    for number, entries in state["state"].items():
        parameter = parameters[int(number)]
        numbered[int(number)] = {
            name: _like(v, parameter) if isinstance(v, torch.Tensor) and v.shape == parameter.shape else v
            for name, v in entries.items()
        }
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in state["param_groups"]]
    return {"state": numbered, "param_groups": groups}


def _like(source: torch.Tensor, target: Any) -> torch.Tensor:
    if not is_sharded(target):
        return source.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
