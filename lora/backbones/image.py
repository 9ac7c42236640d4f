"""What FLUX and SANA have in common when they are moved to an `AutoencoderDC` (DC-Gen, arXiv 2509.25180)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, DiffusionPipeline
from torch import nn

from ..config import ConfigError
from ..data.cache import fingerprint
from .base import Backbone, encoded_how
from .folders import load_autoencoder, load_part, read_config, write_pipeline
from .image_family import ImageFamily, ImageParts


class ImageBackbone(ImageFamily, Backbone):
    """An image pipeline that is moved to another autoencoder.

    Args:
        base, dtype, device, merge_text_padding, guidance: as those of `ImageFamily`.
        autoencoder: folder or hub id of the `AutoencoderDC`.
        autoencoder_dtype: in which the new autoencoder encodes; it is saved as it was.
        autoencoder_tiling: both autoencoders encode large pictures in tiles.

    Raises:
        ConfigError: something is missing or does not fit together.
    """

    def __init__(
        self,
        base: str,
        autoencoder: str,
        dtype: torch.dtype = torch.float32,
        autoencoder_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        merge_text_padding: bool = False,
        guidance: float | None = None,
        autoencoder_tiling: bool = False,
    ) -> None:
        super().__init__(base, dtype, device, merge_text_padding, guidance)
        self.autoencoder_path = autoencoder
        new = read_config(AutoencoderDC, autoencoder)
        if new.get("_class_name") != "AutoencoderDC":
            raise ConfigError(f"model.autoencoder: {autoencoder} is a {new.get('_class_name')}; give an AutoencoderDC.")
        self.check_base()
        self.autoencoder = load_autoencoder(AutoencoderDC, autoencoder, "model.autoencoder", dtype=autoencoder_dtype)
        self.autoencoder.requires_grad_(False).eval()
        self.autoencoder_tiling = autoencoder_tiling
        if autoencoder_tiling:
            self.autoencoder.enable_tiling()
        self.latent_channels = self.autoencoder.config.latent_channels
        self.factor = self.autoencoder.spatial_compression_ratio

    @abstractmethod
    def new_embedding(self) -> nn.Module:
        """The new embedder: Xavier weights, bias zero."""

    @abstractmethod
    def swap(self, transformer: nn.Module) -> None:
        """Put a new embedder and head into a transformer, and their shape into its config."""

    @abstractmethod
    def embed(self, embedding: nn.Module, latents: torch.Tensor, old: bool) -> torch.Tensor:
        """Tokens `[B, D, h, w]` of latents `[B, C, H, W]`, with the old embedder or the new one."""

    @property
    @abstractmethod
    def embedding_name(self) -> str:
        """Where the embedder lies in the transformer."""

    # -- Backbone ------------------------------------------------------------------------------------------------------

    def student(self) -> nn.Module:
        transformer = self.transformer_class.from_pretrained(self.base, subfolder="transformer", dtype=self.dtype)
        self.swap(transformer)
        for name, parameter in transformer.named_parameters():
            if name.startswith(self.trained_fully):  # what is trained stays float32 whatever the others are
                parameter.data = parameter.data.float()
        return transformer.requires_grad_(False)

    def skeleton(self) -> nn.Module:
        with init_empty_weights():
            return self.transformer_class.from_config(self.config)

    def aligner(self) -> ImageAligner:
        return ImageAligner(self, self.new_embedding(), "latents")

    def teacher(self) -> ImageAligner:
        embedding = load_part(self.transformer_class, self.base, self.embedding_name, self.dtype).float()
        return ImageAligner(self, embedding, "teacher").requires_grad_(False).to(self.device)

    def parts(self, align: bool) -> tuple[str, ...]:
        return ("latents", "teacher") if align else ("latents",)

    def encoder(self, parts: Sequence[str]) -> ImageEncoder:
        return ImageEncoder(self, tuple(parts))

    @abstractmethod
    def assemble(self, base: DiffusionPipeline, vae: nn.Module, transformer: nn.Module) -> DiffusionPipeline:
        """The DC-Gen pipeline, with the other components of the base."""

    def save(self, transformer: nn.Module, folder: Path) -> None:
        pipe = self.assemble(self.load("scheduler"), self.autoencoder, transformer.to("cpu"))
        write_pipeline(pipe, folder, self.base, self.text_parts, self.autoencoder_path)

    def sampler(self, transformer: nn.Module) -> DiffusionPipeline:
        return self.assemble(self.load("scheduler"), self.autoencoder.to(self.device), transformer)


class ImageAligner(nn.Module):
    """An embedder under its name in the transformer, which takes one part of a batch."""

    def __init__(self, backbone: ImageBackbone, embedding: nn.Module, part: str) -> None:
        super().__init__()
        self._backbone, self.part = [backbone], part
        names = backbone.embedding_name.split(".")
        holder: nn.Module = self
        for name in names[:-1]:
            holder.add_module(name, nn.Module())
            holder = getattr(holder, name)
        holder.add_module(names[-1], embedding)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Tokens `[B, D, 1, h, w]`."""
        backbone = self._backbone[0]
        embedding = self.get_submodule(backbone.embedding_name)
        return backbone.embed(embedding, batch[self.part][:, :, 0], old=self.part == "teacher")[:, :, None]


class ImageEncoder(ImageParts):
    """ "latents" `[C, 1, H/f, W/f]` of the new autoencoder, scaled, and "teacher", those of the old one."""

    def __init__(self, backbone: ImageBackbone, parts: tuple[str, ...]) -> None:
        super().__init__(backbone, tiled=backbone.autoencoder_tiling)
        self.autoencoder, self.parts = backbone.autoencoder, parts
        names = {"latents": lambda: fingerprint(self.autoencoder), "teacher": self.name_of_own}
        dtypes = {"latents": self.autoencoder.dtype, "teacher": self.dtype}
        self.identities = {
            name: f"image {name} 1, {names[name]()}{encoded_how(dtypes[name], self.tiled)}" for name in parts
        }

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, parts: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        parts = self.parts if parts is None else parts
        pictures = pixels[:, :, 0].to(self.family.device)
        made = {}
        if "latents" in parts:
            new = self.autoencoder.to(self.family.device)
            made["latents"] = new.encode(pictures.to(new.dtype)).latent.float() * new.config.scaling_factor
        if "teacher" in parts:
            made["teacher"] = self.own_latents(pictures)
        return {name: value[:, :, None] for name, value in made.items()}

    def release(self) -> None:
        super().release()
        self.autoencoder.to("cpu")
