"""Latents that a user gives, checked before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def check_latents(latents: Any, shape: Sequence[int], what: str) -> None:
    """See that latents are those of what is made.

    Args:
        latents: that were given.
        shape: that they must have.
        what: is made, and what the shape means.

    Raises:
        ValueError: they are no tensor, of another shape, or have NaN or infinite values.
    """
    if not isinstance(latents, torch.Tensor):
        raise ValueError(f"latents is a {type(latents).__name__}: give a tensor {list(shape)}.")
    if tuple(latents.shape) != tuple(shape):
        raise ValueError(f"latents is {list(latents.shape)}, and this {what.format(list(shape))}.")
    # Of floats of 8 bits torch does not tell it.
    if not (latents.float() if latents.dtype.itemsize == 1 else latents).isfinite().all():
        raise ValueError("latents has NaN or infinite values, of which nothing is made: give others.")
