"""FLUX and SANA as they are, with the autoencoder they were trained with: what both have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from ..config import ConfigError
from .base import ModelOptions
from .image_family import ImageFamily, ImageParts
from .pipeline_own import OwnPipelineModel


class OwnImageModel(OwnPipelineModel, ImageFamily):
    """An image pipeline whose transformer is trained.

    Args:
        base: folder or hub id of the pipeline.
        options: without `stage` and `first_frame`; `fps` is of no concern to images.
    """

    def __init__(self, base: str, options: ModelOptions) -> None:
        for name in ("stage", "first_frame"):
            if getattr(options, name) is not None:
                raise ConfigError(f"model.{name} is of no use: {type(self).__name__} has one transformer, for images.")
        super().__init__(base, options)
        self.check_base()
        self.factor = self.unit()

    @abstractmethod
    def unit(self) -> int:
        """What height and width must be a multiple of, in pixels."""

    def encoder(self) -> OwnImageEncoder:
        return OwnImageEncoder(self)


class OwnImageEncoder(ImageParts):
    """ "latents" `[C, 1, H/f, W/f]` of the base's own autoencoder, as the model sees them."""

    parts = ("latents",)

    def __init__(self, model: OwnImageModel) -> None:
        super().__init__(model, model.autoencoder_dtype, model.autoencoder_tiling)
        how = f"{model.autoencoder_dtype}{' tiled' if model.autoencoder_tiling else ''}"
        self.identities = {"latents": f"image own 1, {self.name_of_own()} {how}"}

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, parts: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        return {"latents": self.own_latents(pixels[:, :, 0].to(self.family.device))[:, :, None]}
