"""Latents and embeddings that a user gives, checked before the first step."""

from __future__ import annotations

import inspect
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
    check_finite("latents", latents)


def check_finite(name: str, value: torch.Tensor) -> None:
    """Raise ValueError for NaN or infinite values in what was given under a name."""
    # Of floats of 8 bits torch does not tell it.
    if not (value.float() if value.dtype.itemsize == 1 else value).isfinite().all():
        raise ValueError(f"{name} has NaN or infinite values, of which nothing is made: give others.")


class FiniteEmbeddings:
    """Has a pipeline refuse embeddings of prompts with NaN or infinite values, once a run."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the pipeline; ValueError for embeddings that are not finite."""
        encode: Any = super().encode_prompt  # type: ignore[misc]
        for name, value in inspect.signature(encode).bind(*args, **kwargs).arguments.items():
            if name.endswith("prompt_embeds") and isinstance(value, torch.Tensor):
                check_finite(name, value)
        return encode(*args, **kwargs)
