"""Image models that were moved to another autoencoder: their new ends, and what an adapter for one is loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, FluxTransformer2DModel, SanaTransformer2DModel
from torch import nn

from ...autoencoders.checkpoint_file import variant_in
from .adapted import AdaptedKind, started_anew, zero_head
from .published_files import LayoutError, hub_options


def flux_embedding(channels: int, inner: int) -> nn.Linear:
    """A new embedder of FLUX: `[..., channels] -> [..., inner]`, a token a latent pixel."""
    return started_anew(nn.Linear(channels, inner))


def sana_embedding(channels: int, inner: int) -> nn.Conv2d:
    """A new embedder of SANA: `[B, channels, H, W] -> [B, inner, H, W]`."""
    return started_anew(nn.Conv2d(channels, inner, kernel_size=1))


def retarget_flux(transformer: FluxTransformer2DModel, in_channels: int, out_channels: int) -> FluxTransformer2DModel:
    """Give FLUX a new embedder and a head that starts at zero, for latents without the packing of 2x2."""
    inner, dtype = transformer.proj_out.in_features, transformer.proj_out.weight.dtype
    transformer.x_embedder = flux_embedding(in_channels, inner).to(dtype)
    transformer.proj_out = zero_head(inner, out_channels, dtype)
    transformer.out_channels = out_channels
    transformer.register_to_config(patch_size=1, in_channels=in_channels, out_channels=out_channels)
    return transformer


def retarget_sana(transformer: SanaTransformer2DModel, in_channels: int, out_channels: int) -> SanaTransformer2DModel:
    """Give SANA a new embedder and a head that starts at zero."""
    inner, dtype = transformer.proj_out.in_features, transformer.proj_out.weight.dtype
    transformer.patch_embed.proj = sana_embedding(in_channels, inner).to(dtype)
    transformer.proj_out = zero_head(inner, out_channels, dtype)
    transformer.register_to_config(in_channels=in_channels, out_channels=out_channels)
    return transformer


def _image_autoencoder(
    location: str | Path, dtype: torch.dtype | None, options: Mapping[str, Any], changes: Mapping[str, Any] | None
) -> AutoencoderDC:
    if changes:
        raise LayoutError(f"autoencoder_config ({', '.join(changes)}) is for a DC-AE-V file, of videos: leave it out.")
    folder = Path(location).expanduser()
    place, variant = (folder, variant_in(folder, options.get("variant"))) if folder.is_dir() else (location, None)
    # As of videos, it is float32 where nobody says otherwise, in whatever it is kept.
    return AutoencoderDC.from_pretrained(place, dtype=dtype or torch.float32, variant=variant, **hub_options(options))


FLUX = AdaptedKind(
    FluxTransformer2DModel, "transformer_blocks", ("x_embedder.", "proj_out."), retarget_flux, _image_autoencoder
)
SANA = AdaptedKind(
    SanaTransformer2DModel, "transformer_blocks", ("patch_embed.proj.", "proj_out."), retarget_sana, _image_autoencoder
)
