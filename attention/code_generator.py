"""What torch's code generator, inductor, needs on a device, asked before a run instead of in its middle."""

from __future__ import annotations

import functools
import os
import shutil

import torch

from .own_kernels import INSTALL_TRITON, has_triton

OLDEST_GPU = (7, 0)
"""Capability of the first NVIDIA GPUs that triton compiles for."""


def missing(device: torch.device) -> str | None:
    """What `torch.compile` lacks on a device, as the end of "it ..."; None where it has what it needs."""
    if device.type == "cpu" and not _cpp_compiler():
        return "needs a C++ compiler on the CPU and found none (install g++ or set CXX)"
    if device.type == "cpu" and " " in torch.__file__:
        # torch passes the folder of its libraries to the linker unquoted.
        return f"cannot be compiled with a space in the path of torch ({os.path.dirname(torch.__file__)})"
    if device.type == "cuda" and not has_triton():
        return f"needs triton, which is not installed: {INSTALL_TRITON}"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            return f"needs a GPU of capability 7.0, and this one has {capability[0]}.{capability[1]}"
    return None


@functools.cache
def _cpp_compiler() -> bool:
    named = os.environ.get("CXX", "").split()
    usual = ("cl",) if os.name == "nt" else ("g++", "clang++", "c++")
    return any(shutil.which(name) for name in (*named[:1], *usual))
