"""Kandinsky 5 and 6: the video alone; Kandinsky 6 makes sound with it where its parts for that are there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...pipelines import head_counts
from .frames import FROM_FIVE, ROUNDED
from .row import Config, PipelineRow, stated_factors
from .sequence import Shape, grid


def _tiled_attention(row: PipelineRow, transformer: Config, index: Config) -> PipelineRow:
    """NABLA, the attention of the models for 10 s, looks at tiles of 8 x 8 tokens."""
    return replace(row, nearest_size=_whole_tiles) if transformer.get("attention_type") == "nabla" else row


def _whole_tiles(height: int, width: int, transformer: Config, size_factor: int) -> tuple[int, int]:
    step = 8 * size_factor * tuple(transformer.get("patch_size", (1, 2, 2)))[1]
    high, wide = (max(1, round(side / step)) * step for side in (height, width))
    return high, wide


def _pictured(shape: Shape) -> Any:
    """The first picture is a latent frame more, at the end."""
    return grid(shape, shape.latent_frames + ("image" in shape.given))


def _takes_pictures(row: PipelineRow, transformer: Config, index: Config) -> PipelineRow:
    looks = transformer.get("visual_cond", True) and transformer.get("visual_token_type_num_embeddings", 0) >= 2
    return row if looks else replace(row, takes={})


def _sound(pipe: Any, result: Any) -> tuple[Any, int] | None:
    audio = getattr(result, "audio", None)
    return None if audio is None else (audio[0], int(pipe.audio_sample_rate))


def _with_sound(pipe: Any, settings: Any) -> dict[str, Any]:
    parts = (getattr(pipe, name, None) for name in ("audio_vae", "vocoder"))
    return {"sample_audio": all(part is not None for part in parts)}


_KANDINSKY_5 = PipelineRow(
    "Kandinsky5T2VPipeline",
    ROUNDED,
    fps=24.0,
    factors=stated_factors,
    no_negative_prompt=None,
    heads=head_counts.kandinsky,
    by_config=_tiled_attention,
)

ROWS = (
    _KANDINSKY_5,
    replace(
        _KANDINSKY_5,
        pipeline="Kandinsky5I2VPipeline",
        frames=FROM_FIVE,
        takes={"image": "image"},
        needs=(("image",),),
    ),
    replace(
        _KANDINSKY_5,
        pipeline="Kandinsky6TI2VAPipeline",
        takes={"image": "image"},
        rate="frame_rate",
        always=_with_sound,
        sequence=_pictured,
        audio=_sound,
        by_config=_takes_pictures,
    ),
)
