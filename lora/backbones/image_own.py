"""FLUX and SANA as they are, with the autoencoder they were trained with: what both have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from ..config import ConfigError
from ..data.cache import fingerprint
from .base import OwnModel, SampleRequest
from .image_family import ImageFamily, ImageParts


class OwnImageModel(ImageFamily, OwnModel):
    """An image pipeline whose transformer is trained.

    Args:
        base, dtype, device, merge_text_padding, guidance: as those of `ImageFamily`.
        autoencoder_dtype: in which pictures are encoded.
        stage, first_frame: must be None.
        fps: of no concern to images.

    Raises:
        ConfigError: something is missing or does not fit together.
    """

    def __init__(
        self,
        base: str,
        dtype: torch.dtype = torch.float32,
        autoencoder_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        merge_text_padding: bool = False,
        guidance: float | None = None,
        stage: str | None = None,
        first_frame: bool | None = None,
        fps: float | None = None,
    ) -> None:
        for name, value in (("stage", stage), ("first_frame", first_frame)):
            if value is not None:
                raise ConfigError(f"model.{name} is of no use: {type(self).__name__} has one transformer, for images.")
        super().__init__(base, dtype, device, merge_text_padding, guidance)
        self.autoencoder_dtype = autoencoder_dtype
        self.check_base()
        self.factor = self.unit()

    @abstractmethod
    def unit(self) -> int:
        """What height and width must be a multiple of, in pixels."""

    def transformer(self, quantisation: Any = None) -> nn.Module:
        transformer = self.transformer_class.from_pretrained(
            self.base, subfolder="transformer", dtype=self.dtype, quantization_config=quantisation
        )
        return transformer.requires_grad_(False)

    def skeleton(self) -> nn.Module:
        with init_empty_weights():
            return self.transformer_class.from_config(self.config)

    def encoder(self) -> OwnImageEncoder:
        return OwnImageEncoder(self)

    def after_step(self, request: SampleRequest) -> Any:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            made = request.callback(pipe, step, timestep, tensors)
            # Under mixed precision the model answers in float32, which the pipeline of FLUX hands to the autoencoder.
            return {**made, "latents": made["latents"].to(pipe.vae.dtype)}

        return callback

    def sampler(self, transformer: nn.Module) -> DiffusionPipeline:
        pipe = self.load("scheduler", "vae")
        pipe.to(self.device)  # before the transformer is in it, which may be spread over devices
        pipe.register_modules(transformer=transformer)
        return pipe


class OwnImageEncoder(ImageParts):
    """ "latents" `[C, 1, H/f, W/f]` of the base's own autoencoder, as the model sees them."""

    parts = ("latents",)

    def __init__(self, model: OwnImageModel) -> None:
        super().__init__(model, model.autoencoder_dtype)
        self.identities = {"latents": f"image own 1, {fingerprint(self.loaded_own())} {model.autoencoder_dtype}"}

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, parts: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        return {"latents": self.own_latents(pixels[:, :, 0].to(self.family.device))[:, :, None]}
