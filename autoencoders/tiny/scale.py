"""Latents as a transformer has them, from latents as its autoencoder takes and gives them."""

from __future__ import annotations

from typing import Any

import torch

# By how their pipelines scale latents; the names are those of diffusers' classes.
_BY_CONFIG = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderDCV")
_BY_BUFFERS = ("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video")
_BY_FACTOR = ("AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15", "AutoencoderKLCogVideoX")

KNOWN = (*_BY_CONFIG, *_BY_BUFFERS, *_BY_FACTOR)
"""Classes of autoencoders whose scale is known."""


def to_transformer(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """What `vae` decodes, or encoded, in the scale of the transformer.

    Args:
        vae: an autoencoder of one of the classes in `KNOWN`.
        latents: `[B, C, T, h, w]`.

    Raises:
        ValueError: an autoencoder whose scale is not known.
    """
    name = type(vae).__name__
    if name in _BY_FACTOR:
        return latents * vae.config.scaling_factor
    if name in _BY_CONFIG:
        mean, std = vae.config.latents_mean, vae.config.latents_std
    elif name in _BY_BUFFERS:
        mean, std = vae.latents_mean, vae.latents_std / vae.config.scaling_factor
    else:
        raise ValueError(f"the scale of the latents of a {name} is not known; known are {', '.join(KNOWN)}.")
    mean, std = (
        torch.as_tensor(x, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1, 1) for x in (mean, std)
    )
    return (latents - mean) / std


def compression_of(vae: Any) -> tuple[int, int]:
    """By what an autoencoder divides frames, and height and width."""
    name, config = type(vae).__name__, vae.config
    if name == "AutoencoderKLCogVideoX":
        return int(config.temporal_compression_ratio), 2 ** (len(config.block_out_channels) - 1)
    if name == "AutoencoderKLQwenImage":
        return 2 ** sum(config.temperal_downsample), 2 ** len(config.temperal_downsample)
    if name == "AutoencoderKLWan":
        return config.scale_factor_temporal, config.scale_factor_spatial
    return vae.temporal_compression_ratio, vae.spatial_compression_ratio


def channels_of(vae: Any) -> int:
    """Channels of the latents of an autoencoder."""
    return int(getattr(vae.config, "z_dim", None) or vae.config.latent_channels)


def frames_of(vae: Any, latents: int) -> int:
    """Frames that an autoencoder makes of so many latent frames."""
    time, _ = compression_of(vae)
    name = type(vae).__name__
    # CogVideoX decodes two latent frames at a time, of which only an odd first one is causal.
    causal = name != "AutoencoderDCV" and not (name == "AutoencoderKLCogVideoX" and latents % 2 == 0)
    # A DC-AE-V that puts copies before the first frame drops them again.
    return (latents - 1) * time + 1 if causal else latents * time - getattr(vae.config, "pad_frames", 0)
