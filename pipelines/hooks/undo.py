"""`restore`: a pipeline as it was, whatever this package put into it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..acceleration import handle as acceleration
from ..acceleration.rebinding import SparseProcessor
from ..length import handle as length
from ..length import rotary
from .hooked import handles_on, take_off_alone

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
    pipelines that share it was given it; and with it all else that its handle undoes, in that pipeline too.

    Raises:
        TypeError: no transformer of the pipeline is known.
    """
    modules = list(_modules(pipe))
    for name in (PRESET, CFG_PARALLEL, GUIDANCE_CACHE, GUIDANCE_FREE):
        own = getattr(pipe, name, None)
        for handle in ([] if own is None else [own]) + [each for on in modules for each in handles_on(on, name)]:
            handle.remove()
    for module in modules:
        take_off_alone(module)
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
    processors = (getattr(module, "processor", None) for module in _modules(pipe))
    return "sparse attention" if any(isinstance(processor, SparseProcessor) for processor in processors) else ""


def _modules(pipe: Any) -> Iterator[torch.nn.Module]:
    """Those of all components of a pipeline, or of a transformer alone."""
    for part in (getattr(pipe, "components", None) or {"transformer": pipe}).values():
        if isinstance(part, torch.nn.Module):
            yield from part.modules()
