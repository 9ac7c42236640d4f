"""The noise that a run starts with, as loud as its scheduler wants it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def scaled_start(pipe: Any) -> Iterator[None]:
    """While this lasts, a pipeline multiplies its first noise with its scheduler's `init_noise_sigma`.

    diffusers' pipelines of flow models leave that out, because for their own schedulers it is 1. For `RCMScheduler` it
    is .9877 (sigma_max 80) or .9950 (200). Pipelines that start from a noisy video scale it themselves, and stay as
    they are.

    Args:
        pipe: a pipeline with `prepare_latents`.
    """
    scale = getattr(getattr(pipe, "scheduler", None), "init_noise_sigma", 1.0)
    prepare = getattr(pipe, "prepare_latents", None)
    if not _scales(pipe) or prepare is None or "timestep" in inspect.signature(prepare).parameters:
        yield
        return

    def scaled(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        return (made[0] * scale, *made[1:]) if isinstance(made, tuple) else made * scale

    pipe.prepare_latents = scaled
    try:
        yield
    finally:
        del pipe.prepare_latents


def _scales(pipe: Any) -> bool:
    from .rcm import RCMScheduler

    return isinstance(getattr(pipe, "scheduler", None), RCMScheduler)
