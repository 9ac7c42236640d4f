"""Tiny decoders: frames from latents in a small part of the autoencoder's time."""

from __future__ import annotations

from .decoder import TinyVideoDecoder
from .published import read_tiny
from .scale import KNOWN, channels_of, compression_of, frames_of, to_transformer

__all__ = ["KNOWN", "TinyVideoDecoder", "channels_of", "compression_of", "frames_of", "read_tiny", "to_transformer"]
