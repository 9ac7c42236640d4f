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


def processor_for(pipe: Any, present: Any, own: Any, factor: int) -> Any:
    """The processor of pixels for an autoencoder that reduces a side by `factor`: one of a class of ours, in the place
    of diffusers'. One of the user's own class stays, and one with methods of the user's own gets the factor alone.

    Args:
        pipe: the pipeline. present: its processor. own: our class.
    """
    if type(present) not in own.__mro__:
        return present
    if type(present) is not own and not any(map(callable, vars(present).values())):
        present = own.from_config(present.config)
    if present.config.vae_scale_factor != factor:
        present.register_to_config(vae_scale_factor=factor)
    if type(present) is own:
        present.halves = tuple(
            name
            for name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module) and getattr(part, "dtype", None) == torch.float16
        )
    return present


def _tell_of_no_picture(pixels: torch.Tensor, what: str, halves: tuple[str, ...]) -> None:
    low, high = pixels.aminmax()
    if not (high - low).isfinite():
        advice = "nothing here is in float16, so look at the weights, the LoRAs and the embeddings that it was given"
        if halves:
            advice = (
                f"{' and '.join(halves)} in float16 may have overflowed, as models that were trained in bfloat16 do: "
                "load the pipeline in bfloat16 or float32"
            )
        logger.warning("%s NaN or infinite values in %s: %s.", what, pixels.dtype, advice)


class ToldVideo(VideoProcessor):
    """Says of a video that it has no picture; as pixels of PIL it would be black."""

    halves: tuple[str, ...] = ()
    """Components in float16."""

    def postprocess_video(self, video: torch.Tensor, output_type: str = "np") -> Any:
        _tell_of_no_picture(video, "The video has", self.halves)
        return super().postprocess_video(video, output_type)


class ToldPictures(VaeImageProcessor):
    """The same of pictures."""

    halves: tuple[str, ...] = ()

    def postprocess(self, image: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _tell_of_no_picture(image, "The pictures have", self.halves)
        return super().postprocess(image, *args, **kwargs)


class ToldSanaPictures(ToldPictures, PixArtImageProcessor):
    """The same with what SANA's has beside it, sizes in bins."""
