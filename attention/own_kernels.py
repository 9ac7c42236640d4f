"""Whether the project's own Triton kernels can run what torch would otherwise compute."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch

INSTALL_TRITON = "pip install triton (on Windows: triton-windows)"
# Looked up once, here: torch.compile cannot trace the search for a module.
_FOUND = importlib.util.find_spec("triton") is not None

logger = logging.getLogger(__name__)


def has_triton() -> bool:
    """Whether triton is installed."""
    return _FOUND


def use_kernels(x: torch.Tensor) -> bool:
    """Whether `x` lies where the kernels run: on CUDA, with triton installed (if not, that is logged once)."""
    return x.is_cuda and (has_triton() or _without_triton())


@functools.cache
def _without_triton() -> bool:
    logger.warning("planning on the GPU runs in plain torch, which is slower: %s", INSTALL_TRITON)
    return False
