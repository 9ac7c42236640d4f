"""What diffusers' group offloading (`enable_group_offload`) does with the weights of a module."""

from __future__ import annotations

from typing import Any

from torch import nn

from .diffusers_hooks import hooks_of


def is_in_group(module: nn.Module) -> bool:
    """Whether it moves the weights of a module."""
    return _hook(module) is not None


def is_on_disk(module: nn.Module) -> bool:
    """Whether it drops the weights of a module between two passes, and reads them from a file again."""
    hook = _hook(module)
    return hook is not None and getattr(hook.group, "offload_to_disk_path", None) is not None


def is_streamed(module: nn.Module) -> bool:
    """Whether it copies the weights of a module to the device on a stream, from copies of its own on the CPU: what is
    changed on the device is lost."""
    hook = _hook(module)
    return hook is not None and getattr(hook.group, "stream", None) is not None


def _hook(module: nn.Module) -> Any:
    return hooks_of(module).get("group_offloading")
