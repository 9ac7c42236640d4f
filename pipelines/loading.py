"""Load a saved pipeline as the command line wants it, and what its class would do by default."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


def find_class(name: str) -> type[DiffusionPipeline]:
    """A pipeline class by name: this package's or diffusers' own.

    Raises:
        AttributeError: there is none.
    """
    import diffusers

    from .. import pipelines

    return getattr(pipelines if name in pipelines.__all__ else diffusers, name)


def load_pipeline(
    location: str,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    pipeline_class: str = "DiffusionPipeline",
    offload: bool = False,
    tiling: bool = False,
) -> DiffusionPipeline:
    """Load a pipeline and place it, without progress bars.

    The autoencoder stays in float32, as diffusers' examples for Wan have it, whatever `dtype` is.

    Args:
        location: a folder that `save_pretrained` wrote, or a hub id; for DC-VideoGen also an adapter's folder.
        dtype: of all components but the autoencoder.
        device: where it runs.
        pipeline_class: its name; "DiffusionPipeline" finds out which of diffusers' it is.
        offload: keep only the component at work on `device` (`enable_model_cpu_offload`).
        tiling: let the autoencoder work in tiles.

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
    pipe = find_class(pipeline_class).from_pretrained(location, dtype=dtypes)
    if tiling:
        pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def call_defaults(pipeline_class: str) -> dict[str, Any]:
    """The default arguments of the `__call__` of a pipeline class and of those it is built on, by name."""
    found: dict[str, Any] = {}
    for cls in reversed(find_class(pipeline_class).__mro__):
        if "__call__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__call__"]).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not p.empty}
    return found
