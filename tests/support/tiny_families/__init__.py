"""The real transformer of every video family at a tiny size, with what its forward pass is called with."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from . import cosmos, hunyuan, others, text_first, wan_kin
from .base import GRID, Tiny

BUILDERS = wan_kin.BUILDERS | hunyuan.BUILDERS | text_first.BUILDERS | cosmos.BUILDERS | others.BUILDERS

__all__ = ["BUILDERS", "GRID", "Tiny", "build"]


def build(name: str, layers: int = 2, **more: Any) -> Tiny:
    """A model and its arguments, always the same for a name; some builders have a number of layers of their own, and
    some take more."""
    torch.manual_seed(0)
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        tiny = BUILDERS[name](layers, **more)
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
    tiny.model.eval().requires_grad_(False)
    return tiny
