"""Rough estimates of the memory that a video takes, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def transformer_bytes(tokens: int, width: int, itemsize: int) -> int:
    """Activations of one forward pass.

    A block holds about 16 tensors of the model's width at a time (the feed-forward layer alone is four wide or more).
    """
    return 16 * tokens * width * itemsize


def decoder_bytes(vae: Mapping[str, Any], height: int, width: int, itemsize: int) -> int:
    """Activations while frames of `height` x `width` pixels, or tiles of that size, are decoded.

    Four tensors of the last stage: of one chunk at half resolution for DC-AE-V, of the four frames of a latent frame at
    full resolution for Wan's autoencoder.
    """
    if "block_out_channels" in vae:
        per_pixel = vae["block_out_channels"][1] / 4 * vae["chunk_size"]
    else:
        per_pixel = 4 * (vae.get("decoder_base_dim") or vae["base_dim"])
    return round(4 * per_pixel * height * width * itemsize)


def video_bytes(frames: int, height: int, width: int, itemsize: int = 4) -> int:
    """The decoded video."""
    return 3 * frames * height * width * itemsize
