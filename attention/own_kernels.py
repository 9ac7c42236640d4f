"""Whether the project's own Triton kernels can run what torch would otherwise compute."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

INSTALL_TRITON = "pip install triton (on Windows: triton-windows)"

logger = logging.getLogger(__name__)


def use_kernels(x: torch.Tensor) -> bool:
    """Whether `x` lies where the kernels run: on CUDA, with triton installed (if not, that is logged once)."""
    return x.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning("planning on the GPU runs in plain torch, which is slower: %s", INSTALL_TRITON)
    return found
