"""Settings of the recipe `tiny_decoder`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..config import Settings, setting
from .reconstructing import ReconstructionSettings


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What latents are of.

    Args:
        base: folder or hub id of a pipeline, folder of adapter-only weights, or "demo" or "demo-dc"; its autoencoder
            stays as it is.
        target: what the decoder learns to make: the clips ("frames"), or what the autoencoder makes of their latents
            ("decoded"), which takes its decoding in every step.
        autoencoder_dtype: in which it encodes and decodes.
    """

    base: str = setting(free=True, place=True)
    target: Literal["frames", "decoded"] = "frames"
    autoencoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class DecoderSettings(Settings):
    """The decoder.

    Args:
        start: one to go on from, a file in the layout of TAEHV or a folder of this recipe; None for a new one of the
            fields below.
        block_out_channels, layers_per_block, time_growth, patch_size, variant: of `TinyVideoDecoder`.
        file_dtype: of the weights that are written.
    """

    start: str | None = setting(None, free=True, place=True)
    block_out_channels: tuple[int, ...] = (256, 128, 64, 64)
    layers_per_block: int = setting(3, low=1)
    time_growth: tuple[int, ...] = (1, 2, 2)
    patch_size: int = setting(1, low=1)
    variant: Literal["base", "super"] = "base"
    file_dtype: Literal["float32", "float16"] = setting("float32", free=True)


@dataclass(frozen=True, kw_only=True)
class TinyDecoderSettings(ReconstructionSettings):
    """Settings of the recipe `tiny_decoder`."""

    model: ModelSettings
    decoder: DecoderSettings = field(default_factory=DecoderSettings)

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.loss.latent:
            yield "loss.latent is of latents, which this recipe leaves as they are: set it to 0."
        if self.loop.gradient_checkpointing:
            yield "loop.gradient_checkpointing is true, which a tiny decoder cannot: train on smaller or shorter clips."
