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
MOST_CHANNELS = 256  # head_dim

logger = logging.getLogger(__name__)


def has_triton() -> bool:
    """Whether triton is installed."""
    return _FOUND


def use_kernels(x: torch.Tensor) -> bool:
    """Whether the kernels can work on `x [..., D]`, and run where it lies.

    That is on CUDA of compute capability 8.0 and up, with triton installed (if not, that is logged once).
    """
    if not x.is_cuda or x.dtype == torch.float64 or (x.is_floating_point() and x.shape[-1] > MOST_CHANNELS):
        return False
    properties = torch.cuda.get_device_properties(x.device)  # torch.compile knows this way of asking
    return (properties.major, properties.minor) >= MIN_COMPUTE_CAPABILITY and (has_triton() or _without_triton())


@functools.cache
def _without_triton() -> bool:
    logger.warning("planning on the GPU runs in plain torch, which is slower: %s", INSTALL_TRITON)
    return False
