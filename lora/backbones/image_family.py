"""What image models have in common, with whichever autoencoder: their parts, and how they are called."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from .base import Encoder, SampleRequest, Text
from .pipeline_family import PipelineFamily


class ImageFamily(PipelineFamily):
    """An image pipeline in diffusers' layout. Images are clips of one frame.

    Args, Raises: as those of `PipelineFamily`.
    """

    factor: int
    """What height and width must be a multiple of."""

    @abstractmethod
    def check_base(self) -> None:
        """Raise ConfigError for a base that cannot be trained."""

    @abstractmethod
    def old_latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of the base's own autoencoder as the model sees them, for pictures `[B, 3, H, W]` in [-1, 1]."""

    @abstractmethod
    def prompt_inputs(self, text: Text, negative: Text) -> dict[str, Any]:
        """Arguments of the pipeline for a prompt and a negative prompt."""

    # -- PretrainedModel -----------------------------------------------------------------------------------------------

    def check_size(self, frames: int, height: int, width: int) -> str | None:
        if frames != 1:
            return f"clips of {frames} frames do not fit an image model: set frames: 1."
        if height % self.factor or width % self.factor:
            return f"{height}x{width} must be a multiple of {self.factor}, the autoencoder's factor."
        return None

    def after_step(self, request: SampleRequest) -> Any:
        """`callback_on_step_end` of a pipeline."""
        return request.callback

    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        pipe = self.sampler_of(transformer)
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe(
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pt",
            callback_on_step_end=self.after_step(request),
            **self.prompt_inputs(*texts),
        ).images
        return pictures[0][:, None].float().cpu() * 2 - 1


class ImageParts(Encoder):
    """What pictures are encoded with that belongs to an image pipeline: its autoencoder.

    Args:
        family: whose.
        dtype: of the autoencoder.
        tiled: it encodes large pictures in tiles.
    """

    def __init__(self, family: ImageFamily, dtype: torch.dtype = torch.float32, tiled: bool = False) -> None:
        self.family, self.dtype, self.tiled = family, dtype, tiled
        self._own: Any = None

    @property
    def own(self) -> nn.Module:
        """The autoencoder of the base, where it runs."""
        return self.loaded_own().to(self.family.device)

    def loaded_own(self) -> nn.Module:
        if self._own is None:
            self._own = self.family.vae_class.from_pretrained(self.family.base, subfolder="vae", dtype=self.dtype)
            self._own.requires_grad_(False).eval()
            if self.tiled:
                self._own.enable_tiling()
        return self._own

    def name_of_own(self) -> str:
        """What the autoencoder is, where that is known without loading it."""
        return self.family.fingerprints.of(self.family.base, "vae", self.dtype, self.loaded_own)

    def own_latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents of pictures `[B, 3, H, W]`, in float32."""
        own: Any = self.own
        return self.family.old_latents(own, pictures.to(self.dtype)).float()

    def release(self) -> None:
        self._own = None
