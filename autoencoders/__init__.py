"""Autoencoders: DC-AE-V as a diffusers model."""

from __future__ import annotations

from .autoencoder_dc_v import AutoencoderDCV
from .presets import PRESETS, preset

__all__ = ["PRESETS", "AutoencoderDCV", "preset"]
