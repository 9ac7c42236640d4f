"""DC-VideoGen, image to video.

Source: DC-VideoGen (arXiv 2509.25182). A module of its own: where torchvision is not installed, the image encoder's
classes complain on import, and text to video has no use for them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import get_module_execution_device
from diffusers.video_processor import VideoProcessor
from PIL.Image import Image
from torch.nn import functional

from ...autoencoders import AutoencoderDCV
from .canvas import Canvas
from .constructor import constructor_of
from .given_latents import check_finite
from .outputs import check_output
from .text_to_video import DCVideoGen, videos_of


class DCVideoGenImageToVideoPipeline(DCVideoGen, WanImageToVideoPipeline):
    """Image to video with DC-VideoGen: the transformer also sees 4 mask channels and the latents of the image.

    `from_pretrained` loads what `DCVideoGenPipeline.from_pretrained` does.
    """

    _sees_image = True

    __init__ = constructor_of(WanImageToVideoPipeline, vae=AutoencoderDCV)

    def __call__(
        self,
        image: Any,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 80,
        *args: Any,
        last_image: Any = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> WanPipelineOutput | tuple:
        """Generate videos that start with `image`. Arguments are those of `diffusers.WanImageToVideoPipeline`, but for:

        Args:
            image: one, or a list, tensor or array of one for each prompt. Tensors are `[3, H, W]` or `[B, 3, H, W]`,
                arrays `[H, W, 3]` or `[B, H, W, 3]`, of floats in [0, 1] (or in [-1, 1], where one is below 0) or of
                bytes. The image encoder sees them as they are given.
            height, width, num_frames, output_type: as for `DCVideoGenPipeline`. Where the canvas is larger, the edge of
                the picture is repeated outwards.
            last_image: with which the video ends; one, or as many as of `image`. The published weights were not trained
                with one.
            image_embeds: states of the image encoder, as `encode_image` gives them, `[B, N, D]`, for the pictures of
                `image` and then those of `last_image`; they are given beside these, which the autoencoder encodes.

        Raises:
            ValueError: sizes under 1, an unknown `output_type`, images of other shapes or numbers, not as many as
                prompts, a `last_image` for a model that does not take one, `image_embeds` without `image` or for other
                pictures, latents or embeddings that are not finite, or what `WanImageToVideoPipeline` refuses.
        """
        check_output(output_type)
        image, last_image = _coloured(image, "image"), _coloured(last_image, "last_image")
        videos = videos_of(prompt, kwargs)
        canvas = self._canvas(num_frames, height, width, videos, output_type != "latent")
        if image is None:
            raise ValueError(
                "image is None: the transformer sees the picture itself beside the noise, so give it, also beside "
                "image_embeds."
            )
        self._check_images(_count(image), _count(last_image), videos)
        self._check_states(kwargs.get("image_embeds"), _count(image) + _count(last_image))
        transformers = [model for model in (self.transformer, self.transformer_2) if model is not None]
        with self._pictures_on(canvas), one_state_a_video(transformers, _count(image), _count(last_image)):
            output = super().__call__(
                image,
                prompt,
                negative_prompt,
                canvas.height,
                canvas.width,
                canvas.causal_frames,
                *args,
                last_image=last_image,
                output_type=output_type,
                return_dict=False,
                **kwargs,
            )
        return self._cropped(output, canvas, output_type, return_dict)

    def _check_images(self, first: int, last: int, videos: int) -> None:
        """Refuse numbers of first and last images that `__call__` does not take.

        Raises:
            ValueError: see `__call__`.
        """
        if not first or videos % first:
            raise ValueError(f"There are {first} images for {videos} videos: give one, or one for each prompt.")
        if last not in (0, 1, first):
            raise ValueError(f"There are {last} last images for {first} images: give one, or as many.")
        if self.transformer is None or self.transformer.config.image_dim is None:
            return
        takes_two = self.transformer.config.pos_embed_seq_len is not None
        if takes_two and not last:
            raise ValueError("The transformer looks at a first and a last image: give last_image, too.")
        if last and not takes_two:
            raise ValueError(
                "The transformer looks at one image: leave last_image out, or load a model that takes two."
            )

    def _check_states(self, states: Any, pictures: int) -> None:
        """Refuse states of the image encoder that are not those of so many pictures.

        Raises:
            ValueError: see `__call__`.
        """
        if states is None:
            return
        width = None if self.transformer is None else self.transformer.config.image_dim
        if width is None:
            raise ValueError("The transformer does not look at states of an image encoder: leave image_embeds out.")
        shape = list(states.shape) if isinstance(states, torch.Tensor) else type(states).__name__
        if not isinstance(shape, list) or len(shape) != 3 or (shape[0], shape[2]) != (pictures, width):
            raise ValueError(
                f"image_embeds is {shape}: give a tensor [{pictures}, N, {width}], the states of each picture, as "
                "encode_image makes them."
            )
        check_finite("image_embeds", states)

    @contextmanager
    def _pictures_on(self, canvas: Canvas) -> Iterator[None]:
        """While this is open, pictures that the autoencoder encodes are put on a canvas."""
        usual = self.video_processor
        self.video_processor = OnCanvas.of(canvas, usual)
        try:
            yield
        finally:
            self.video_processor = usual

    def check_inputs(self, prompt: Any, negative_prompt: Any, image: Any, *args: Any, **kwargs: Any) -> None:
        """diffusers refuses lists and arrays here, which it can do, and pictures beside their states, without which it
        cannot do anything."""
        inputs = inspect.signature(super().check_inputs).bind(prompt, negative_prompt, image, *args, **kwargs).arguments
        beside_states = image is None or inputs.get("image_embeds") is not None
        super().check_inputs(**{**inputs, "image": None if beside_states else torch.empty(0)})

    def encode_image(self, image: Any, device: torch.device | None = None) -> torch.Tensor:
        """States of the image encoder, `[B, N, D]`.

        Args:
            image: pictures, tensors or arrays as the pipeline takes them, or a list of these, each with its batch. The
                image encoder's own processor would take numbers in [0, 1] for bytes and divide them by 255 once more.
            device: where the result goes.
        """
        return super().encode_image(_pictures(image), device)

    def prepare_latents(
        self,
        image: torch.Tensor,
        batch_size: int,
        num_channels_latents: int = 32,
        height: int = 480,
        width: int = 832,
        num_frames: int = 77,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        last_image: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise `[B, C, T, H, W]` and condition `[B, 4 + C, T, H, W]`: a mask, 1 where a picture is given, and the
        scaled latents of a video that shows the picture for 4 frames and then mid-grey.
        """
        latents = self._latents(
            batch_size, num_channels_latents, height, width, num_frames, dtype, device, generator, latents
        )
        condition = image_condition(self.vae, image, latents.shape[2], last_image).to(device, dtype)
        return latents, condition.repeat_interleave(batch_size // image.shape[0], dim=0)


class OnCanvas(VideoProcessor):
    """Resizes pictures to the video, whatever size is asked for, and extends them to its canvas; what becomes of the
    video is up to the pipeline's usual processor.
    """

    canvas: Canvas
    usual: VideoProcessor

    @classmethod
    def of(cls, canvas: Canvas, usual: VideoProcessor) -> OnCanvas:
        # That of the autoencoder would round the size of the video down.
        processor = cls(vae_scale_factor=1)
        processor.canvas, processor.usual = canvas, usual
        return processor

    def postprocess_video(self, video: torch.Tensor, output_type: str = "np") -> Any:
        return self.usual.postprocess_video(video, output_type)

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None, **_: Any) -> torch.Tensor:
        """Pixels `[B, 3, H, W]` in [-1, 1]; those of a list may have a size and a kind each."""
        if isinstance(image, list):
            return torch.cat([self.preprocess(one) for one in image])
        canvas = self.canvas
        pixels = super().preprocess(image, height=canvas.asked_height, width=canvas.asked_width)
        return functional.pad(pixels.float(), canvas.margins, mode="replicate")


@contextmanager
def one_state_a_video(transformers: list[torch.nn.Module], first: int, last: int) -> Iterator[None]:
    """While this is open, every video of a batch comes with the image encoder's states of its own pictures.

    diffusers repeats the states of all pictures as often as there are prompts, which is right for one picture and one
    video a prompt.

    Args:
        transformers: that are given the states, if any, as `[repetitions * (first + last), N, D]`.
        first, last: how many pictures videos begin and end with, for all videos; the first ones come first.
    """

    def arrange(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        states = kwargs.get("encoder_hidden_states_image")
        if states is None:
            return args, kwargs
        videos = kwargs["hidden_states"].shape[0]
        kinds = [part for part in states[: first + last].split([first, last]) if len(part)]
        spread = [part.repeat_interleave(videos // len(part), dim=0) for part in kinds]
        return args, {**kwargs, "encoder_hidden_states_image": torch.stack(spread, dim=1).flatten(0, 1)}

    # A set: what stands in both places is called once a step.
    hooks = [model.register_forward_pre_hook(arrange, with_kwargs=True) for model in set(transformers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _count(image: Any) -> int:
    """How many pictures there are in what the pipeline takes as `image`."""
    if image is None:
        return 0
    if isinstance(image, list | tuple):
        return sum(_count(one) for one in image)
    return image.shape[0] if isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 4 else 1


def _coloured(image: Any, name: str) -> Any:
    """The pictures with 3 channels, of numbers that mean what diffusers takes them for; tuples become lists.

    Raises:
        ValueError: see `DCVideoGenImageToVideoPipeline.__call__`.
    """
    if isinstance(image, list | tuple):
        return [_coloured(one, name) for one in image]
    if isinstance(image, Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if image is None:
        return None
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise ValueError(f"{name} is a {type(image).__name__}: give a PIL picture, a tensor, an array, or a list.")
    channels = image.shape[-3 if isinstance(image, torch.Tensor) else -1] if image.ndim in (3, 4) else 0
    if channels != 3:
        raise ValueError(
            f"{name} is {list(image.shape)}: a tensor must be [3, H, W] or [B, 3, H, W], and an array [H, W, 3] or "
            "[B, H, W, 3]."
        )
    if 0 in image.shape:
        raise ValueError(f"{name} is {list(image.shape)}, which has no pixels: give at least one picture of 1x1.")
    dtype = str(image.dtype).removeprefix("torch.")
    if dtype == "uint8":
        return (image.float() if isinstance(image, torch.Tensor) else image.astype(np.float32)) / 255
    if not dtype.startswith(("float", "bfloat")):
        raise ValueError(f"{name} has numbers of {dtype}: give floats in [0, 1], or bytes (uint8).")
    if isinstance(image, torch.Tensor):
        # Neither the extremes of floats of 8 bits nor numbers with gradients are to be had from torch.
        image = image.detach().float() if image.dtype.itemsize == 1 else image.detach()
    low, high = float(image.min()), float(image.max())
    if not math.isfinite(high - low):
        raise ValueError(f"{name} has NaN or infinite numbers: give floats in [0, 1], or bytes (uint8).")
    # Those of a picture that was resized may go a little beyond.
    if high > 2:
        raise ValueError(f"{name} has numbers up to {high:g}: give floats in [0, 1], or bytes (uint8).")
    if low < -1.5:
        raise ValueError(
            f"{name} has numbers down to {low:g}, as one that was normalised for an image encoder: give floats in "
            "[0, 1] or [-1, 1], or bytes (uint8)."
        )
    return image


def _pictures(image: Any) -> list:
    """The PIL pictures of a tensor `[B, 3, H, W]` or an array `[B, H, W, 3]` of floats in [0, 1], or in [-1, 1] where
    one is below 0, as diffusers has it; others as they came; of lists, those of all that is in them.
    """
    if isinstance(image, list):
        return [picture for one in image for picture in _pictures(one)]
    if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
        image = torch.from_numpy(image).movedim(-1, -3)
    if not isinstance(image, torch.Tensor) or not image.is_floating_point():
        return [image]
    pixels = image.detach().float().cpu().reshape(-1, *image.shape[-3:])
    pixels = pixels if pixels.min() < 0 else pixels * 2 - 1
    return VideoProcessor(vae_scale_factor=1).postprocess(pixels, output_type="pil")


def image_condition(
    vae: Any, image: torch.Tensor, latent_frames: int, last_image: torch.Tensor | None = None
) -> torch.Tensor:
    """What an image-to-video transformer sees beside the noise: `[B, 4 + C, T, H/f, W/f]`.

    Args:
        vae: an `AutoencoderDCV`.
        image: `[B, 3, H, W]` in [-1, 1], the first frame.
        latent_frames: T.
        last_image: like `image`, the last frame.

    Raises:
        ValueError: `last_image` for a video of which the first image takes all frames.
    """
    temporal, pad = vae.temporal_compression_ratio, vae.config.pad_frames
    frames = latent_frames * temporal - pad
    # The frames of the first latent frame, which begins with the padding; at least the one that the padding repeats.
    first = max(temporal - pad, 1)
    if last_image is not None and frames <= first:
        raise ValueError(
            f"The video has {frames} frames, of which the first image takes {first}: with last_image give num_frames "
            f"of at least {frames + 1}."
        )
    video = image.new_zeros(image.shape[0], image.shape[1], frames, *image.shape[2:])
    video[:, :, :first] = image.unsqueeze(2)
    if last_image is not None:
        video[:, :, max(frames - temporal, first) :] = last_image.unsqueeze(2)
    # Not vae.device: with offloading its weights are elsewhere until it runs.
    video = video.to(get_module_execution_device(vae), vae.dtype)
    encoded = vae.encode(video).latent * vae.config.scaling_factor
    mask = encoded.new_zeros(encoded.shape[0], 4, *encoded.shape[2:])
    mask[:, :, 0] = 1
    if last_image is not None:
        mask[:, :, -1] = 1
    return torch.cat([mask, encoded], dim=1)


__all__ = ["DCVideoGenImageToVideoPipeline", "image_condition"]
