"""Wan and its kin: their transformers see the video alone, and their autoencoder is Wan's, which runs in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .frames import FIVE, FROM_21, HELIOS, ROUNDED, SEGMENTS, chunks
from .row import Config, PipelineRow, downsampling_factors
from .sequence import Shape, grid

_IMAGE = {"image": "image"}
_FIRST = (("image",),)
_SKYREELS: dict[str, Any] = {"fps": 24.0, "follows": False}
SKYREELS_WINDOW = 97
"""Frames that SkyReels' diffusion forcing makes at once; a longer video goes on from what was made before."""
SKYREELS_OVERLAP = 17
_SEGMENT = 77


def _rate_of_5b(row: PipelineRow, transformer: Config, index: Config) -> PipelineRow:
    """TI2V-5B, whose autoencoder is another, makes 24 frames a second, and takes a picture with the same weights."""
    if not index.get("expand_timesteps"):
        return row
    pictured = {} if "video" in row.takes else {"image": "WanImageToVideoPipeline"}
    return replace(row, fps=24.0, variants={**row.variants, **pictured})


def _last_picture(row: PipelineRow, transformer: Config, index: Config) -> PipelineRow:
    """The transformer's image encoder looks at one picture or at two (first-last frame); without it any will do."""
    if index.get("expand_timesteps"):
        return replace(row, fps=24.0)
    if transformer.get("image_dim") is None:
        return replace(row, takes={**_IMAGE, "last_image": "last_image"})
    if transformer.get("pos_embed_seq_len") is None:
        return row
    return replace(row, takes={**_IMAGE, "last_image": "last_image"}, needs=(*_FIRST, ("last_image",)))


def _reference(settings: Any) -> dict[str, Any]:
    """VACE's picture is no frame, but something to be seen."""
    given: dict[str, Any] = {}
    if settings.image is not None:
        given["reference_images"] = [settings.image]
    if settings.video is not None:
        given["video"] = settings.pictures("video")
    return given


def _with_reference(shape: Shape) -> Any:
    return grid(shape, shape.latent_frames + ("image" in shape.given))


def _animated(shape: Shape) -> Any:
    """A segment, after the reference picture."""
    return grid(shape, (_SEGMENT - 1) // shape.frame_factor + 2)


def _segments(frames: int, factor: int) -> int:
    return max(1, -(-(frames - 1) // (_SEGMENT - 1)))


def _window(shape: Shape) -> Any:
    """As much as is made at once."""
    frames = min(shape.frames, SKYREELS_WINDOW)
    return grid(shape, (frames - 1) // shape.frame_factor + 1)


def _windows(frames: int, factor: int) -> int:
    latent, window = (frames - 1) // factor + 1, (SKYREELS_WINDOW - 1) // factor + 1
    overlap = (SKYREELS_OVERLAP - 1) // factor + 1
    return 1 if latent <= window else 2 + (latent - window - 1) // (window - overlap)


def _overlap(pipe: Any, settings: Any) -> dict[str, Any]:
    """A video that is longer than the window has to say how much of it is seen again."""
    return {"overlap_history": SKYREELS_OVERLAP} if settings.frames > SKYREELS_WINDOW else {}


def _helios(shape: Shape) -> Any:
    """A chunk of nine latent frames, after 16, 2 and 1 that went before and the first of all."""
    return grid(shape, 9, before=shape.history((16, 4, 8), (2, 2, 4), (2, 1, 2)), beside="history")


def _pyramid_steps(steps: int) -> dict[str, Any]:
    """Steps over three sizes, the first ones getting what is left over."""
    return {"pyramid_num_inference_steps_list": [steps // 3 + (stage < steps % 3) for stage in range(3)]}


def _distilled(row: PipelineRow, transformer: Any, index: Any) -> PipelineRow:
    """Helios distilled: no guidance, and the two steps a size of its authors."""
    if not index.get("is_distilled"):
        return row
    return replace(row, guidance="", defaults=lambda transformer, size_factor: {"steps": 6})


_HELIOS = PipelineRow(
    "HeliosPipeline",
    HELIOS,
    fps=24.0,
    takes={"image": "image", "video": "video"},
    continues="before",
    least_video=33,
    sequence=_helios,
    parts=chunks,
    windows=("history_sizes", "num_latent_frames_per_chunk", "keep_first_frame"),
    follows=False,
    device_noise=True,
)
_FORCING = PipelineRow(
    "SkyReelsV2DiffusionForcingPipeline",
    sequence=_window,
    parts=_windows,
    windows=("base_num_frames", "overlap_history"),
    rate="fps",
    always=_overlap,
    variants={
        "image": "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "video": "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    },
    **_SKYREELS,
)

ROWS = (
    PipelineRow("WanPipeline", follows=False, variants={"video": "WanVideoToVideoPipeline"}, by_config=_rate_of_5b),
    PipelineRow("WanImageToVideoPipeline", follows=False, takes=_IMAGE, needs=_FIRST, by_config=_last_picture),
    PipelineRow(
        "WanVideoToVideoPipeline",
        follows=False,
        takes={"video": "video"},
        needs=(("video",),),
        strength="strength",
        defaults=lambda transformer, size_factor: {"frames": 81},
        by_config=_rate_of_5b,
    ),
    PipelineRow(
        "LucyEditPipeline",
        follows=False,
        takes={"video": "video"},
        needs=(("video",),),
        by_config=_rate_of_5b,
    ),
    PipelineRow(
        "WanVACEPipeline",
        follows=False,
        factors=downsampling_factors,
        takes={"image": "reference_images", "video": "video"},
        inputs=_reference,
        sequence=_with_reference,
    ),
    PipelineRow(
        "WanAnimatePipeline",
        SEGMENTS,
        fps=30.0,
        follows=False,
        takes={"image": "image", "video": "pose_video", "face_video": "face_video"},
        needs=(("image",), ("video",), ("face_video",)),
        sequence=_animated,
        parts=_segments,
        windows=("segment_frame_length", "prev_segment_conditioning_frames"),
        defaults=lambda transformer, size_factor: {"frames": 77},
    ),
    PipelineRow("DCVideoGenPipeline", follows=False),
    PipelineRow(
        "DCVideoGenImageToVideoPipeline",
        follows=False,
        takes={**_IMAGE, "last_image": "last_image"},
        needs=_FIRST,
        by_config=_last_picture,
    ),
    PipelineRow(
        "ChronoEditPipeline",
        FIVE,
        follows=False,
        takes=_IMAGE,
        needs=_FIRST,
        no_options={"enable_temporal_reasoning": "of five frames there are none to reason with"},
    ),
    PipelineRow("SkyReelsV2Pipeline", **_SKYREELS),
    PipelineRow(
        "SkyReelsV2ImageToVideoPipeline",
        takes={**_IMAGE, "last_image": "last_image"},
        needs=_FIRST,
        by_config=lambda row, transformer, index: replace(_last_picture(row, transformer, {}), fps=24.0),
        **_SKYREELS,
    ),
    _FORCING,
    replace(
        _FORCING,
        pipeline="SkyReelsV2DiffusionForcingImageToVideoPipeline",
        takes={**_IMAGE, "last_image": "last_image"},
        needs=_FIRST,
        variants={},
    ),
    replace(
        _FORCING,
        pipeline="SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        frames=FROM_21,
        takes={"video": "video"},
        needs=(("video",),),
        continues="before",
        repeats_video=True,
        variants={},
        always=lambda pipe, settings: {"overlap_history": SKYREELS_OVERLAP},
    ),
    PipelineRow("AnyFlowPipeline", ROUNDED, takes={"video": "video"}, continues="inside", follows=False),
    PipelineRow(
        "AnyFlowFARPipeline",
        ROUNDED,
        takes={"video": "video"},
        continues="inside",
        windows=("chunk_partition",),
        follows=False,
    ),
    _HELIOS,
    replace(
        _HELIOS,
        pipeline="HeliosPyramidPipeline",
        steps=_pyramid_steps,
        least_steps=3,
        by_config=_distilled,
        defaults=lambda transformer, size_factor: {"steps": 30},
    ),
)
