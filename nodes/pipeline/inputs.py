"""What a video starts from: IMAGE and VIDEO of ComfyUI as a request has them, and no more frames of them than are used.

No ComfyUI module is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...generation.models.facts import ModelFacts
from ...generation.requests.inputs import VideoSource
from ...generation.requests.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import torch

Clip = Callable[[int | None], "torch.Tensor"]
"""A video that is not decoded yet: how many frames are used, None for all -> its first ones, `[F, H, W, 3]` in [0, 1],
with one more where there are more. It may give all of them."""


def first_frames(video: Any, of_file: bool, most: int | None) -> torch.Tensor:
    """A `Clip` of a VIDEO, once its first two arguments are given.

    ComfyUI decodes to float32, 37 GiB a minute of 1080p. So a file is decoded up to the last frame that is wanted.

    Args:
        video: ComfyUI's.
        of_file: whether it is a `VideoFromFile`. Others have their frames in memory, and would be compressed to be
            trimmed.
        most: see `Clip`.
    """
    if of_file and most is not None:
        whole = _seconds(video)
        seconds = (most + 2) / float(video.get_frame_rate())
        while seconds < whole:
            images = video.as_trimmed(0, seconds, strict_duration=False).get_components().images
            if len(images) > most:
                return images
            seconds *= 2  # the rate is a mean, and the first frames may be slower
    return video.get_components().images


def _seconds(video: Any) -> float:
    """How long a file is; 0 where it does not tell, as a picture may not: it is then decoded as a whole."""
    try:
        return float(video.get_duration())
    except ValueError:
        return 0.0


def read(settings: Settings, facts: ModelFacts) -> Settings:
    """A request whose pictures are PIL's and whose videos are read, up to the last frame that is used.

    Args:
        settings: with an IMAGE in image and last_image, a `Clip` in video and face_video.
        facts: of the pipeline that takes them.

    Raises:
        BadInput: one is missing or of no use; nothing is decoded then.
    """
    settings.check_inputs(facts)
    frames, video, face = settings.frames, settings.video, settings.face_video
    usual = frames or facts.call_defaults().get("frames")
    if video is not None:
        # What goes on after a video does so from its last frames; others are as long as it where nothing is asked for.
        most = {"before": None, "inside": usual}.get(facts.row.continues, frames)
        video = _source("video", video, most)
        usual = usual if facts.row.continues else frames or video.frames
    return replace(
        settings,
        image=_picture(settings.image),
        last_image=_picture(settings.last_image),
        video=video,
        face_video=None if face is None else _source("face_video", face, usual),
    )


def _source(field: str, clip: Clip, most: int | None) -> VideoSource:
    images = clip(most)
    frames = _bytes(images[:most])
    return VideoSource(len(frames), given=frames, field=field, more=len(images) > len(frames))


def _picture(image: torch.Tensor | None) -> Any:
    """The first picture of an IMAGE, as PIL has it."""
    from PIL import Image

    return None if image is None else Image.fromarray(_bytes(image[:1])[0])


def _bytes(images: torch.Tensor) -> np.ndarray:
    """An IMAGE as `[F, H, W, 3]` bytes, without transparency; frame by frame, since it may be most of the memory."""
    import torch

    images = images[..., :3]
    made = torch.empty(images.shape, dtype=torch.uint8)
    for frame, into in zip(images, made, strict=True):
        into.copy_((frame.clamp(0, 1) * 255).round())
    return made.numpy()
