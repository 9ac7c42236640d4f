"""Parts of image pipelines at tiny sizes: FLUX and SANA transformers, and AutoencoderDCs."""

from __future__ import annotations

from diffusers import AutoencoderDC, FluxTransformer2DModel, SanaTransformer2DModel

FLUX = {
    "patch_size": 1,
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 4, 8),
}
SANA = {
    "patch_size": 1,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": 12,
    "sample_size": 32,
}


def flux_transformer(**changes: object) -> FluxTransformer2DModel:
    """One block of each kind."""
    return FluxTransformer2DModel(**{**FLUX, **changes})


def sana_transformer(**changes: object) -> SanaTransformer2DModel:
    """One block."""
    return SanaTransformer2DModel(**{**SANA, **changes})


def autoencoder_dc(stages: int, channels: int) -> AutoencoderDC:
    """One that compresses `2 ** (stages - 1)` times."""
    shape = {"block_out_channels": (8,) * stages, "layers_per_block": (1,) * stages}
    settings = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in shape.items()}
    kinds = {f"{side}_block_types": "ResBlock" for side in ("encoder", "decoder")}
    heads = {f"{side}_qkv_multiscales": ((),) * stages for side in ("encoder", "decoder")}
    return AutoencoderDC(
        latent_channels=channels, attention_head_dim=4, scaling_factor=0.5, **settings, **kinds, **heads
    )
