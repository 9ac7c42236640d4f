"""Tiny decoders of random weights for autoencoders of pipelines."""

from __future__ import annotations

from typing import Any

import torch

from vidaccel.autoencoders.tiny import TinyVideoDecoder, channels_of, compression_of


def decoder_for(vae: Any, **changes: Any) -> TinyVideoDecoder:
    """One with the channels and the compression of an autoencoder, 4 or 8 in time and a multiple of 8 in space."""
    torch.manual_seed(0)
    time, space = compression_of(vae)
    shape = {
        "latent_channels": channels_of(vae),
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "time_growth": {4: (1, 2, 2), 8: (2, 2, 2)}[time],
        "patch_size": space // 8,
        **changes,
    }
    decoder = TinyVideoDecoder(**shape).eval()
    for parameter in decoder.parameters():
        parameter.data.mul_(2)  # or all frames are about grey
    return decoder.requires_grad_(False)
