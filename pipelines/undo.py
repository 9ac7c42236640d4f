"""`restore`: a pipeline as it was, whatever this package put into it."""

from __future__ import annotations

from typing import Any

import torch

from .acceleration import handle as acceleration
from .acceleration.rebinding import SparseProcessor
from .length import handle as length
from .length import rotary

GUIDANCE_FREE = "_vidaccel_guidance_free"
"""Attribute of a pipeline that holds its guidance-free handle."""

PRESET = "_vidaccel_preset"
"""Attribute of a pipeline that holds the handle of its preset."""

QUANTISED = "_vidaccel_quantised"
"""Attribute of a pipeline whose layers are in 8 bits for good: the `Quantize` that says how."""


CFG_PARALLEL = "_vidaccel_cfg_parallel"
"""Attribute of a pipeline that holds the handle of its shared guidance."""

GUIDANCE_CACHE = "_vidaccel_guidance_cache"
"""Attribute of a pipeline that holds the handle of its guidance cache."""

TINY_DECODER = "_vidaccel_tiny_decoder"
"""Attribute of an autoencoder that holds the handle of the tiny decoder in its place."""


def restore(pipe: Any) -> None:
    """Undo `apply`, `accelerate`, `guidance_free`, `guidance_cache`, `cfg_parallel`, `lengthen`, `riflex` and
    `tiny_decoder` where the handle is lost, as after running a notebook cell twice.

    Does nothing to a pipeline that nothing was done to. What was put into a transformer goes, whichever of the
    pipelines that share it was given it.

    Raises:
        TypeError: no transformer of the pipeline is known.
    """
    preset = getattr(pipe, PRESET, None)
    if preset is not None:
        preset.remove()
    for name in (CFG_PARALLEL, GUIDANCE_CACHE, GUIDANCE_FREE):
        handle = getattr(pipe, name, None)
        if handle is not None:
            handle.remove()
    length.restore(pipe)
    decoder = getattr(getattr(pipe, "vae", None), TINY_DECODER, None)
    if decoder is not None:
        decoder.remove()
    acceleration.restore(pipe)
    rotary.restore(pipe)


def sparse_at_work(pipe: Any) -> str:
    """Which of a preset and sparse attention is at work in a pipeline, in words; empty for neither."""
    preset = getattr(pipe, PRESET, None)
    if preset is not None:
        return f"the preset {preset.preset.name}"
    parts = [part for part in getattr(pipe, "components", {}).values() if isinstance(part, torch.nn.Module)]
    processors = (getattr(module, "processor", None) for part in parts for module in part.modules())
    return "sparse attention" if any(isinstance(processor, SparseProcessor) for processor in processors) else ""
