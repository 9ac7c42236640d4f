"""DC-VideoGen, text to video: Wan in a deep-compression latent space (image to video: `image_to_video`).

Source: DC-VideoGen (arXiv 2509.25182). Everything but sizes is diffusers' own: prompts, LoRA, callbacks, offloading.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

from ...autoencoders import AutoencoderDCV
from ...autoencoders.memory import decoding_bytes, default_tile, memory_to_decode
from ..hooks.undo import TINY_DECODER
from .canvas import Canvas
from .constructor import constructor_of
from .given_latents import FiniteEmbeddings, check_latents
from .outputs import ToldVideo, check_output, processor_for
from .published import PublishedLayoutMixin

logger = logging.getLogger(__name__)


def videos_of(prompt: Any, options: Mapping[str, Any]) -> int:
    """How many videos a call makes."""
    embeds = options.get("prompt_embeds")
    prompts = 1 if isinstance(prompt, str) else len(prompt or ()) if embeds is None else len(embeds)
    return prompts * options.get("num_videos_per_prompt", 1)


class DCVideoGen(FiniteEmbeddings, PublishedLayoutMixin):
    """What both pipelines have in common: any size, made on a canvas that the model can do and cropped."""

    video_processor: VideoProcessor
    _sees_image = False

    def _canvas(self, frames: int, height: int, width: int, videos: int = 1, decodes: bool = True) -> Canvas:
        """The canvas for so many videos of one size, which are decoded or not.

        Raises:
            ValueError: a size under 1, or components that do not belong together.
        """
        transformer = self._checked_transformer()
        if self.config.expand_timesteps:
            raise ValueError(
                f"{type(self).__name__} does not do expand_timesteps (Wan 2.2 TI2V 5B): adapt a model with one "
                "timestep for all tokens."
            )
        # Of the autoencoder that is there now: diffusers reads these when a pipeline is made, maybe with another one.
        self.vae_scale_factor_spatial = self.vae.spatial_compression_ratio
        self.vae_scale_factor_temporal = self.vae.temporal_compression_ratio
        self.video_processor = processor_for(self, self.video_processor, ToldVideo, self.vae_scale_factor_spatial)
        canvas = Canvas.for_video(
            frames,
            height,
            width,
            patch=tuple(transformer.config.patch_size),
            spatial=self.vae_scale_factor_spatial,
            temporal=self.vae_scale_factor_temporal,
            pad_frames=self.vae.config.pad_frames,
        )
        if canvas.is_larger:
            logger.info("%s", canvas)
        if decodes and not hasattr(self.vae, TINY_DECODER):  # which takes a small part of it
            self._check_memory(canvas, videos)
        return canvas

    def _check_memory(self, canvas: Canvas, videos: int) -> None:
        """Warn, before the first step, of a decoding that will not fit on the GPU."""
        device = self._execution_device
        if device.type != "cuda":
            return
        room = torch.cuda.get_device_properties(device).total_memory
        together = 1 if self.vae.use_slicing else videos
        needed = together * memory_to_decode(self.vae, canvas.frames, canvas.height, canvas.width)
        if needed > room:
            # Of very long videos the sums where tiles overlap take more than frames that are decoded whole.
            tile, size = default_tile(self.vae.config), (canvas.frames, canvas.height, canvas.width)
            framewise = self.vae.use_framewise_decoding
            tiled = together * decoding_bytes(
                self.vae.config, *size, self.vae.dtype.itemsize, tile, framewise=framewise
            )
            fix = "call pipe.vae.enable_tiling()" if tiled < needed else "make it smaller or shorter"
            fix = fix if framewise else "set pipe.vae.use_framewise_decoding to True"
            fix = "call pipe.vae.enable_slicing()" if together > 1 else fix
            logger.warning(
                "Decoding %s%d frames of %dx%d takes about %.0f GiB beside the weights, and %s has %.0f: %s.",
                f"{together} videos of " if together > 1 else "",
                canvas.frames,
                canvas.width,
                canvas.height,
                needed / 2**30,
                device,
                room / 2**30,
                fix,
            )

    def _checked_transformer(self) -> Any:
        """The transformer; the first of two."""
        if self.vae is None or "chunk_size" not in self.vae.config:
            raise ValueError(
                f"The vae of {type(self).__name__} is {'None' if self.vae is None else type(self.vae).__name__}: it "
                "must be an AutoencoderDCV."
            )
        transformers = [model for model in (self.transformer, self.transformer_2) if model is not None]
        if not transformers:
            raise ValueError(f"{type(self).__name__} has no transformer: load it with one.")
        channels = self.vae.config.latent_channels
        wanted = 2 * channels + 4 if self._sees_image else channels
        for model in transformers:
            given, made = model.config.in_channels, model.config.out_channels
            if (given, made) != (wanted, channels):
                raise ValueError(
                    f"The transformer takes {given} channels and makes {made}, but {type(self).__name__} with an "
                    f"autoencoder of {channels} latent channels needs one that takes {wanted} and makes {channels}: "
                    "they do not belong together."
                )
        return transformers[0]

    def _latents(
        self,
        batch_size: int,
        channels: int,
        height: int,
        width: int,
        frames: int,
        dtype: torch.dtype | None,
        device: torch.device | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Noise `[B, C, T, H, W]`: new, or `latents`.

        Raises:
            ValueError: not as many generators as videos, or latents that `check_latents` refuses.
        """
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"There are {len(generator)} generators for {batch_size} videos: give one, or as many as videos."
            )
        factor, temporal = self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        shape = (batch_size, channels, (frames - 1) // temporal + 1, height // factor, width // factor)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        check_latents(latents, shape, "video takes {}: [videos, channels, latent frames, rows, columns]")
        return latents.to(device=device, dtype=dtype)

    def _cropped(self, output: Any, canvas: Canvas, output_type: str | None, return_dict: bool) -> Any:
        video = output[0]
        if output_type != "latent":
            video = canvas.crop(video)
        return WanPipelineOutput(frames=video) if return_dict else (video,)


class DCVideoGenPipeline(DCVideoGen, WanPipeline):
    """Text to video with DC-VideoGen.

    `from_pretrained` loads a folder in diffusers' layout (as the recipe `ae_adapt` and `save_pretrained` write it) or
    one of the published repositories, which it converts into a cache first, or adapter-only weights.

    Example:
        ```python
        pipe = DCVideoGenPipeline.from_pretrained("path/to/model", dtype=torch.bfloat16).to("cuda")
        video = pipe("a cat walks on grass", height=720, width=1280, num_frames=80).frames[0]
        ```
    """

    __init__ = constructor_of(WanPipeline, vae=AutoencoderDCV)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 80,
        *args: Any,
        output_type: str | None = "np",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> WanPipelineOutput | tuple:
        """Generate videos. Arguments are those of `diffusers.WanPipeline`, but for these:

        Args:
            height, width: pixels, any number. What the model cannot do is made larger and cropped in the middle.
            num_frames: any number; the model makes 4k frames, and those behind `num_frames` are dropped.
            output_type: "latent" gives `[B, C, T/4, H/f, W/f]` of the canvas, uncropped and scaled.

        Raises:
            ValueError: sizes under 1, an unknown `output_type`, latents or embeddings that are not finite, or what
                `WanPipeline` refuses.
        """
        check_output(output_type)
        canvas = self._canvas(num_frames, height, width, videos_of(prompt, kwargs), output_type != "latent")
        output = super().__call__(
            prompt,
            negative_prompt,
            canvas.height,
            canvas.width,
            canvas.causal_frames,
            *args,
            output_type=output_type,
            return_dict=False,
            **kwargs,
        )
        return self._cropped(output, canvas, output_type, return_dict)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int = 32,
        height: int = 480,
        width: int = 832,
        num_frames: int = 77,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise `[B, C, T, H, W]`."""
        return self._latents(
            batch_size, num_channels_latents, height, width, num_frames, dtype, device, generator, latents
        )


__all__ = ["DCVideoGen", "DCVideoGenPipeline"]
