"""HunyuanVideo, SkyReels V1, Framepack and HunyuanVideo 1.5: the video, and behind it the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .frames import FLOORED, FRAMEPACK, LESS_FOUR
from .row import Config, PipelineRow, stated_factors
from .sequence import Shape, grid, text_after

_SIGLIP_TOKENS = 729
_BYT5_TOKENS = 256
_MLLM_TOKENS = 1000


def _first_frames(row: PipelineRow, transformer: Config, index: Config) -> PipelineRow:
    """The model that gets its picture beside the latents makes four frames too many, which the pipeline cuts off."""
    return replace(row, frames=LESS_FOUR) if transformer.get("image_condition_type") == "latent_concat" else row


def _pictured(shape: Shape) -> Any:
    """The picture is looked at through 576 tokens, of which every second or fourth is kept."""
    concatenated = shape.transformer.get("image_condition_type") == "latent_concat"
    return grid(shape, shape.latent_frames + concatenated, after=shape.text + (288 if concatenated else 144))


def _framepack(shape: Shape) -> Any:
    """A section of nine latent frames; before it 16, 2 and 1 others and the picture, behind it picture and text."""
    before = shape.history((16, 4, 8), (2, 2, 4), (2, 1, 2))
    return grid(shape, 9, before=before, after=_SIGLIP_TOKENS + shape.text, beside="history with picture and text")


def _sections(frames: int, factor: int) -> int:
    return max(1, (frames - 1) // (9 * factor))


def _hunyuan_15(shape: Shape) -> Any:
    pictures = _SIGLIP_TOKENS if "image" in shape.given else 0
    return grid(shape, after=pictures + _BYT5_TOKENS + _MLLM_TOKENS)


def bucket(height: int, width: int, transformer: Config, size_factor: int) -> tuple[int, int]:
    """The size that HunyuanVideo 1.5 makes of a picture: its proportions, in as many patches as `target_size` has.

    Its own arithmetic: of all sizes that fill the area, the one whose proportions are next, towards the square.
    """
    patches = round((transformer.get("target_size", 640) / size_factor) ** 2)
    sizes, wide, high = [], patches, 1
    while wide > 0:
        if max(wide, high) / min(wide, high) <= 4:
            sizes.append((wide * size_factor, high * size_factor))
        if (high + 1) * wide <= patches:
            high += 1
        else:
            wide -= 1
    ratio = height / width
    ratios = [(round(h / w, 5), (h, w)) for h, w in sizes]
    towards_square = [(r, size) for r, size in ratios if (r <= ratio if ratio >= 1 else r >= ratio)]
    return min(towards_square, key=lambda entry: abs(entry[0] - ratio))[1]


def _widescreen(transformer: Config, size_factor: int) -> dict[str, int | float]:
    height, width = bucket(9, 16, transformer, size_factor)
    return {"height": height, "width": width}


_HUNYUAN = PipelineRow(
    "HunyuanVideoPipeline",
    FLOORED,
    fps=24.0,
    factors=stated_factors,
    true_guidance="true_cfg_scale",
    sequence=text_after,
    text_varies=True,
)
_PICTURE: dict[str, Any] = {"takes": {"image": "image"}, "needs": (("image",),)}
_HUNYUAN_15 = PipelineRow(
    "HunyuanVideo15Pipeline",
    FLOORED,
    fps=24.0,
    factors=lambda vae: (int(vae.get("temporal_compression_ratio", 4)), int(vae.get("spatial_compression_ratio", 16))),
    defaults=_widescreen,
    guidance="guider",
    sequence=_hunyuan_15,
    text_varies=True,
)

ROWS = (
    _HUNYUAN,
    replace(
        _HUNYUAN,
        pipeline="HunyuanVideoImageToVideoPipeline",
        sequence=_pictured,
        by_config=_first_frames,
        **_PICTURE,
    ),
    replace(
        _HUNYUAN,
        pipeline="HunyuanSkyreelsImageToVideoPipeline",
        guidance="true_cfg_scale",
        true_guidance="",
        **_PICTURE,
    ),
    replace(
        _HUNYUAN,
        pipeline="HunyuanVideoFramepackPipeline",
        frames=FRAMEPACK,
        fps=30.0,
        takes={"image": "image", "last_image": "last_image"},
        needs=(("image",),),
        sequence=_framepack,
        parts=_sections,
        windows=("latent_window_size", "sampling_type"),
    ),
    _HUNYUAN_15,
    replace(
        _HUNYUAN_15,
        pipeline="HunyuanVideo15ImageToVideoPipeline",
        nearest_size=bucket,
        size_of_picture=True,
        **_PICTURE,
    ),
)
