"""Tiny AutoencoderDCs."""

from __future__ import annotations

from diffusers import AutoencoderDC


def autoencoder_dc(stages: int, channels: int) -> AutoencoderDC:
    """One that compresses `2 ** (stages - 1)` times."""
    shape = {"block_out_channels": (8,) * stages, "layers_per_block": (1,) * stages}
    settings = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in shape.items()}
    kinds = {f"{side}_block_types": "ResBlock" for side in ("encoder", "decoder")}
    heads = {f"{side}_qkv_multiscales": ((),) * stages for side in ("encoder", "decoder")}
    return AutoencoderDC(
        latent_channels=channels, attention_head_dim=4, scaling_factor=0.5, **settings, **kinds, **heads
    )
