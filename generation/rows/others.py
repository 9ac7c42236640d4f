"""Allegro, Mochi and Motif-Video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .frames import ALLEGRO, FLOORED, nearest
from .row import Config, PipelineRow, wan_factors
from .sequence import Shape, grid, text_after


def _allegro_factors(vae: Config) -> tuple[int, int]:
    return int(vae.get("temporal_compression_ratio", 4)), 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)


def _allegro_sample(transformer: Config, size_factor: int) -> dict[str, int | float]:
    sizes = {"height": ("sample_height", 90), "width": ("sample_width", 160)}
    found: dict[str, int | float] = {f: transformer.get(n, least) * size_factor for f, (n, least) in sizes.items()}
    return found | {"frames": transformer.get("sample_frames", 22) * 4}


def _allegro_size(height: int, width: int, transformer: Config, size_factor: int) -> tuple[int, int]:
    """What the tiles of its autoencoder, 320 pixels with steps of 200 and 240, cover whole."""
    patch = size_factor * transformer.get("patch_size", 2)

    def side(value: int, step: int) -> int:
        found = nearest(value, lambda n: n >= 320 and not (n - 320) % step and not n % patch)
        return min((n for n in found if n is not None), key=lambda n: abs(n - value), default=320)

    return side(height, 200), side(width, 240)


def _allegro(shape: Shape) -> Any:
    return grid(shape, -(-shape.frames // shape.frame_factor))


def _motif_tokens(shape: Shape) -> Any:
    pictures = 0
    if "image" in shape.given and shape.transformer.get("image_embed_dim") is not None:
        pictures = 729
    return grid(shape, after=shape.text + pictures)


_MOTIF = PipelineRow(
    "MotifVideoPipeline",
    FLOORED,
    fps=24.0,
    factors=wan_factors,
    guidance="guider",
    sequence=_motif_tokens,
    text_varies=True,
    variants={"image": "MotifVideoImage2VideoPipeline"},
)

ROWS = (
    PipelineRow(
        "AllegroPipeline",
        ALLEGRO,
        fps=15.0,
        factors=_allegro_factors,
        defaults=_allegro_sample,
        nearest_size=_allegro_size,
        sequence=_allegro,
        tiled=True,
        follows=False,
    ),
    PipelineRow(
        "MochiPipeline",
        FLOORED,
        fps=30.0,
        factors=lambda vae: (6, 8),
        defaults=lambda transformer, size_factor: {"height": 480, "width": 848},
        sequence=text_after,
        text_varies=True,
        least_steps=2,  # one for each half of its schedule
    ),
    _MOTIF,
    replace(
        _MOTIF,
        pipeline="MotifVideoImage2VideoPipeline",
        takes={"image": "image"},
        needs=(("image",),),
        variants={},
    ),
)
