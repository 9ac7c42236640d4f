"""Load a saved pipeline as the command line wants it, and what its class would do by default."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def load_pipeline(
    location: str, dtype: torch.dtype, device: torch.device | str, *, offload: bool = False
) -> DiffusionPipeline:
    """Load a pipeline and place it, without progress bars.

    The autoencoder stays in float32, as diffusers' examples for Wan have it, whatever `dtype` is.

    Args:
        location: a folder that `save_pretrained` wrote, or a hub id.
        dtype: of all components but the autoencoder.
        device: where it runs.
        offload: keep only the component at work on `device` (`enable_model_cpu_offload`).

    Raises:
        OSError: weights that are missing or unreadable.
    """
    import diffusers
    import torch
    import transformers

    # Several bars of two libraries, none of which says how long the wait is.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    dtypes = {"default": dtype, "vae": torch.float32}
    pipe = diffusers.DiffusionPipeline.from_pretrained(location, dtype=dtypes)
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def call_defaults(pipeline_class: str) -> dict[str, Any]:
    """The default arguments of the `__call__` of a diffusers pipeline class, by name."""
    import diffusers

    call = inspect.signature(getattr(diffusers, pipeline_class).__call__)
    return {p.name: p.default for p in call.parameters.values() if p.default is not p.empty}
