"""What the pipelines give out: which kinds of it there are, and what is said where it is no picture."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.image_processor import PixArtImageProcessor, VaeImageProcessor
from diffusers.video_processor import VideoProcessor

logger = logging.getLogger(__name__)

OUTPUTS = ("np", "pt", "pil", "latent")


def check_output(output_type: Any) -> None:
    """Raise ValueError, before the first step, for what diffusers refuses behind the last one."""
    if output_type not in OUTPUTS:
        raise ValueError(
            f"output_type is {output_type!r}: give {', '.join(map(repr, OUTPUTS[:-1]))} or {OUTPUTS[-1]!r}."
        )


def _tell_of_no_picture(pixels: torch.Tensor, what: str) -> None:
    low, high = pixels.aminmax()
    if not (high - low).isfinite():
        logger.warning(
            "%s NaN or infinite values in %s: load the pipeline in another dtype (bfloat16 or float32); float16 "
            "overflows in models that were trained in bfloat16.",
            what,
            pixels.dtype,
        )


class ToldVideo(VideoProcessor):
    """Says of a video that it has no picture; as pixels of PIL it would be black."""

    def postprocess_video(self, video: torch.Tensor, output_type: str = "np") -> Any:
        _tell_of_no_picture(video, "The video has")
        return super().postprocess_video(video, output_type)


class ToldPictures(VaeImageProcessor):
    """The same of pictures."""

    def postprocess(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _tell_of_no_picture(image, "The pictures have")
        return super().postprocess(image, *args, **kwargs)


class ToldSanaPictures(ToldPictures, PixArtImageProcessor):
    """The same with what SANA's has beside it, sizes in bins."""
