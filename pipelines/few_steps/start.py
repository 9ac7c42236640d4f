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
    they are. In a second one of these it is not scaled again.

    Args:
        pipe: a pipeline with `prepare_latents`.
    """
    scale = getattr(getattr(pipe, "scheduler", None), "init_noise_sigma", 1.0)
    prepare = getattr(pipe, "prepare_latents", None)
    before = vars(pipe).get("prepare_latents")
    scaled_already = getattr(before, "scales_start", False)
    if not _scales(pipe) or prepare is None or scaled_already or "timestep" in inspect.signature(prepare).parameters:
        yield
        return

    def scaled(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        return (made[0] * scale, *made[1:]) if isinstance(made, tuple) else made * scale

    scaled.scales_start = True  # type: ignore[attr-defined]
    pipe.prepare_latents = scaled
    try:
        yield
    finally:
        if before is None:
            del pipe.prepare_latents
        else:
            pipe.prepare_latents = before


def _scales(pipe: Any) -> bool:
    from .rcm import RCMScheduler

    return isinstance(getattr(pipe, "scheduler", None), RCMScheduler)
