"""Whether the project's own Triton kernels can run what torch would otherwise compute."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

INSTALL_TRITON = "pip install triton (on Windows: triton-windows)"
# Looked up once, here: torch.compile cannot trace the search for a module.
_FOUND = importlib.util.find_spec("triton") is not None

MIN_COMPUTE_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies
# AMD's with registers enough (CDNA): on others, such as RDNA's, what the compiler makes of the kernels
# keeps most of its numbers in memory (gfx1100: 702 to 2,900 spilled registers).
AMD = ("gfx908", "gfx90a", "gfx94", "gfx95")
MOST_CHANNELS = 256  # head_dim

logger = logging.getLogger(__name__)


def has_triton() -> bool:
    """Whether triton is installed."""
    return _FOUND


def use_kernels(x: torch.Tensor) -> bool:
    """Whether the kernels can work on `x [..., D]`, and run where it lies.

    That is on a GPU that lacks nothing (`gpu_lacks`), with triton installed (if not, that is logged once).
    """
    if not x.is_cuda or x.dtype == torch.float64 or (x.is_floating_point() and x.shape[-1] > MOST_CHANNELS):
        return False
    return gpu_lacks(x.device) is None and (has_triton() or _without_triton())


def gpu_lacks(device: torch.device) -> str | None:
    """Why the kernels do not run on a GPU, whatever is installed; None where they do."""
    # torch.compile traces through the choice of a backend, and knows this way of asking.
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        return None if name.startswith(AMD) else f"needs an AMD GPU of CDNA ({', '.join(AMD)}), not {name}"
    if (properties.major, properties.minor) >= MIN_COMPUTE_CAPABILITY:
        return None
    needed = ".".join(map(str, MIN_COMPUTE_CAPABILITY))
    return (
        f"needs a GPU of compute capability {needed} or higher, and this one has {properties.major}.{properties.minor}"
    )


@functools.cache
def _without_triton() -> bool:
    logger.warning("planning on the GPU runs in plain torch, which is slower: %s", INSTALL_TRITON)
    return False
