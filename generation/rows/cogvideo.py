"""CogVideoX, ConsisID and EasyAnimate: the text, and behind it the video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .frames import COGVIDEOX, COGVIDEOX_PAIRS, FLOORED
from .row import Config, PipelineRow
from .sequence import Shape, grid, text_before


def _factors(vae: Config) -> tuple[int, int]:
    return int(vae.get("temporal_compression_ratio", 4)), 2 ** (len(vae.get("block_out_channels", (0,) * 4)) - 1)


def _magvit_factors(vae: Config) -> tuple[int, int]:
    stages = len(vae.get("block_out_channels", (0,) * 4))
    return 2 ** (stages - 2), 2 ** (stages - 1)


def _sample(transformer: Config, size_factor: int) -> dict[str, int | float]:
    """The size that the transformer was made for; CogVideoX 1.5's config says how far its positions reach instead."""
    found: dict[str, int | float] = {"frames": transformer.get("sample_frames", 49)}
    if transformer.get("patch_size_t") is not None:
        made_for = _no_larger(768, 1360, transformer, size_factor) if "sample_height" in transformer else (768, 1360)
        return found | dict(zip(("height", "width"), made_for, strict=True))
    sizes = {f: transformer.get(f"sample_{f}") for f in ("height", "width")}
    return found | {name: size * size_factor for name, size in sizes.items() if size}


def _own_size(height: int, width: int, transformer: Config, size_factor: int) -> tuple[int, int]:
    """Learned positions are those of one size."""
    return transformer["sample_height"] * size_factor, transformer["sample_width"] * size_factor


def _no_larger(height: int, width: int, transformer: Config, size_factor: int) -> tuple[int, int]:
    """CogVideoX 1.5's rotary positions reach as far as the size that it was made for."""
    step = 2 * size_factor
    own = _own_size(height, width, transformer, size_factor)
    high, wide = (max(step, min(side, most) // step * step) for side, most in zip((height, width), own, strict=True))
    return high, wide


def _of_version(row: PipelineRow, transformer: Config, index: Config) -> PipelineRow:
    """CogVideoX 1.5, which joins two latent frames in a token, makes 16 frames a second."""
    if transformer.get("use_learned_positional_embeddings"):
        row = replace(row, nearest_size=_own_size)
    if transformer.get("patch_size_t") is None:
        return row
    return replace(row, fps=16.0, nearest_size=_no_larger if "sample_height" in transformer else None)


def _in_pairs(row: PipelineRow, transformer: Config, index: Config) -> PipelineRow:
    """Where the video is given, 1.5 fills nothing up: its number of latent frames has to be even."""
    row = _of_version(row, transformer, index)
    return row if transformer.get("patch_size_t") is None else replace(row, frames=COGVIDEOX_PAIRS)


def _inpainted(settings: Any) -> dict[str, Any]:
    """EasyAnimate's pictures are the known frames of a video whose other frames are to be painted (255 in the mask)."""
    import numpy as np
    import torch

    if settings.image is None and settings.last_image is None:
        return {}
    frames = np.zeros((settings.frames, settings.height, settings.width, 3), np.float32)
    mask = np.full((settings.frames, settings.height, settings.width, 1), 255, np.float32)
    for place, picture in ((0, settings.image), (-1, settings.last_image)):
        if picture is not None:
            frames[place], mask[place] = np.asarray(picture, np.float32) / 255, 0
    given = {"video": frames, "mask_video": mask}
    return {name: torch.from_numpy(values).permute(3, 0, 1, 2)[None] for name, values in given.items()}


def _easyanimate_text(shape: Shape) -> Any:
    """Its call does not say how long the text is."""
    return grid(shape, before=256)


_COGVIDEOX = PipelineRow(
    "CogVideoXPipeline",
    COGVIDEOX,
    fps=8.0,
    factors=_factors,
    defaults=_sample,
    sequence=text_before,
    by_config=_of_version,
)
_PICTURE: dict[str, Any] = {"takes": {"image": "image"}, "needs": (("image",),)}
_EASYANIMATE = PipelineRow("EasyAnimatePipeline", FLOORED, fps=8.0, factors=_magvit_factors, sequence=_easyanimate_text)

ROWS = (
    _COGVIDEOX,
    replace(_COGVIDEOX, pipeline="CogVideoXImageToVideoPipeline", **_PICTURE),
    replace(
        _COGVIDEOX,
        pipeline="CogVideoXVideoToVideoPipeline",
        takes={"video": "video"},
        needs=(("video",),),
        strength="strength",
        by_config=_in_pairs,
    ),
    replace(
        _COGVIDEOX,
        pipeline="CogVideoXFunControlPipeline",
        takes={"video": "control_video"},
        needs=(("video",),),
        by_config=_in_pairs,
    ),
    replace(_COGVIDEOX, pipeline="ConsisIDPipeline", packages={"cv2": "opencv-python"}, **_PICTURE),
    _EASYANIMATE,
    replace(
        _EASYANIMATE,
        pipeline="EasyAnimateInpaintPipeline",
        takes={"image": "video", "last_image": "mask_video"},
        inputs=_inpainted,
    ),
)
