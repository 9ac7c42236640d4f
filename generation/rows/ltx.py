"""LTX-Video and LTX-2: the video alone, in patches of one latent pixel; LTX-2 makes its sound with it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from .frames import FLOORED
from .row import Config, PipelineRow
from .sequence import Shape, grid


def _factors(vae: Config) -> tuple[int, int]:
    """Stated, or counted as the autoencoders count: both are halved as often as `spatio_temporal_scaling` says."""
    halved = 2 ** sum(map(bool, vae.get("spatio_temporal_scaling", (True, True, True, False))))
    temporal = vae.get("temporal_compression_ratio") or (vae.get("patch_size_t") or 1) * halved
    return int(temporal), int(vae.get("spatial_compression_ratio") or (vae.get("patch_size") or 4) * halved)


def _conditions(settings: Any) -> dict[str, Any]:
    """Pictures at the first and the last frame, or a video at the beginning."""
    given: list[tuple[str, Any, int]] = []
    if settings.image is not None:
        given.append(("image", settings.image, 0))
    if settings.video is not None:
        given.append(("video", settings.pictures("video"), 0))
    if settings.last_image is not None:
        given.append(("image", settings.last_image, settings.frames - 1))
    if not given:
        return {}
    # Both lists have an entry for each condition: the pipeline takes no more than the shorter one has.
    lists: dict[str, Any] = {
        kind: [value if told == kind else None for told, value, _ in given] for kind in ("image", "video")
    }
    return lists | {"frame_index": [place for _, _, place in given]}


def _conditions_2(settings: Any) -> dict[str, Any]:
    """As `_conditions`; places are latent frames."""
    given = [
        (settings.image, 0),
        (None if settings.video is None else settings.pictures("video"), 0),
        (settings.last_image, -1),
    ]
    made = [SimpleNamespace(frames=v, index=place, strength=1.0, crf=None) for v, place in given if v is not None]
    return {"conditions": made} if made else {}


def _with_last(shape: Shape) -> Any:
    """A picture at the end is a latent frame more, before the video."""
    layout = grid(shape)
    return replace(layout, text_before=layout.tokens_per_frame) if "last_image" in shape.given else layout


def _sound(pipe: Any, result: Any) -> tuple[Any, int] | None:
    audio = getattr(result, "audio", None)
    return None if audio is None else (audio[0], int(pipe.vocoder.config.output_sampling_rate))


_LTX = PipelineRow(
    "LTXPipeline",
    FLOORED,
    fps=25.0,
    factors=_factors,
    rate="frame_rate",
    least_steps=2,  # the schedule is stretched between its first and its last
    variants={"image": "LTXImageToVideoPipeline"},
)
_PICTURE: dict[str, Any] = {"takes": {"image": "image"}, "needs": (("image",),)}
_ALL: dict[str, Any] = {"continues": "inside", "sequence": _with_last, "variants": {}}
_LTX_2 = replace(
    _LTX,
    pipeline="LTX2Pipeline",
    fps=24.0,
    defaults=lambda transformer, size_factor: {"frames": 121},
    audio=_sound,
    variants={
        "image": "LTX2ImageToVideoPipeline",
        "last_image": "LTX2ConditionPipeline",
        "video": "LTX2ConditionPipeline",
    },
)

ROWS = (
    _LTX,
    replace(
        _LTX,
        pipeline="LTXImageToVideoPipeline",
        variants={},
        **_PICTURE,
    ),
    replace(
        _LTX,
        pipeline="LTXConditionPipeline",
        takes={"image": "image", "last_image": "image", "video": "video"},
        inputs=_conditions,
        windows=("conditions",),
        **_ALL,
    ),
    _LTX_2,
    replace(
        _LTX_2,
        pipeline="LTX2ImageToVideoPipeline",
        variants={"last_image": "LTX2ConditionPipeline", "video": "LTX2ConditionPipeline"},
        **_PICTURE,
    ),
    replace(
        _LTX_2,
        pipeline="LTX2ConditionPipeline",
        takes={"image": "conditions", "last_image": "conditions", "video": "conditions"},
        inputs=_conditions_2,
        **_ALL,
    ),
)
