"""What decoding takes, counted by running the decoder on the meta device, which computes shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def _stated(config: Mapping[str, Any]) -> tuple[int, int]:
    return config["temporal_compression_ratio"], config["spatial_compression_ratio"]


def _by_blocks(config: Mapping[str, Any]) -> tuple[int, int]:
    return int(config["temporal_compression_ratio"]), 2 ** (len(config["block_out_channels"]) - 1)


# Class of diffusers -> config -> pixel frames of a latent frame, pixels of a latent pixel.
COUNTED = {
    "AutoencoderKLHunyuanVideo": _stated,
    "AutoencoderKLHunyuanVideo15": _stated,
    "AutoencoderKLCogVideoX": _by_blocks,
}


def counted_bytes(name: str, config: Mapping[str, Any], frames: int, height: int, width: int, itemsize: int) -> int:
    """The most that decoding one video holds beside the weights, frames whole, with the video itself.

    Args:
        name: of the autoencoder's class, one of `COUNTED`.
        config: of it.
        frames, height, width: of the video.
        itemsize: bytes of a value; 2 for bfloat16.
    """
    import diffusers

    from .live_bytes import LiveBytes

    cls = getattr(diffusers, name)
    dtype = {4: torch.float32, 8: torch.float64}.get(itemsize, torch.bfloat16)
    with torch.device("meta"):
        vae = cls.from_config(dict(config)).eval()
        torch.nn.Module.to(vae, dtype)  # diffusers' own warns of modules to keep in float32, and there are none
    frame_factor, size_factor = COUNTED[name](vae.config)
    latent = (1, vae.config.latent_channels, -(-(frames - 1) // frame_factor) + 1, height // size_factor)
    z = torch.empty(*latent, width // size_factor, dtype=dtype, device="meta")
    with torch.no_grad(), LiveBytes() as live:
        vae.decode(z, return_dict=False)
    return live.peak
