"""What FLUX and SANA have in common when they are moved to an `AutoencoderDC` (DC-Gen, arXiv 2509.25180)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC, DiffusionPipeline
from torch import nn

from ..config import ConfigError
from ..data.cache import fingerprint, tokenizer_fingerprint
from .base import Backbone, Encoder, SampleRequest, Text, TextEncoder
from .folders import load_autoencoder, load_part, read_config, to_cpu, write_model


class ImageBackbone(Backbone):
    """An image pipeline in diffusers' layout. Images are clips of one frame.

    Args:
        base: folder or hub id of the pipeline.
        autoencoder: folder or hub id of the `AutoencoderDC`.
        dtype: of the frozen weights.
        autoencoder_dtype: in which the new autoencoder encodes; it is saved as it was.
        device: where encoders and teacher run.
        merge_text_padding: must be False.
        guidance: what a model that is distilled on a guidance scale is told in training.

    Raises:
        ConfigError: something is missing or does not fit together.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    transformer_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    text_parts: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        base: str,
        autoencoder: str,
        dtype: torch.dtype = torch.float32,
        autoencoder_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        merge_text_padding: bool = False,
        guidance: float = 3.5,
    ) -> None:
        if merge_text_padding:
            raise ConfigError("model.merge_text_padding is for Wan text-to-video models: set it to false.")
        self.base, self.autoencoder_path, self.dtype, self.guidance = base, autoencoder, dtype, guidance
        self.device = torch.device(device)
        self.config = read_config(self.transformer_class, base, "transformer")
        new = read_config(AutoencoderDC, autoencoder)
        if new.get("_class_name") != "AutoencoderDC":
            raise ConfigError(f"model.autoencoder: {autoencoder} is a {new.get('_class_name')}; give an AutoencoderDC.")
        self.check_base()
        self.autoencoder = load_autoencoder(AutoencoderDC, autoencoder, "model.autoencoder", dtype=autoencoder_dtype)
        self.autoencoder.requires_grad_(False).eval()
        self.latent_channels = self.autoencoder.config.latent_channels
        self.factor = self.autoencoder.spatial_compression_ratio

    @abstractmethod
    def check_base(self) -> None:
        """Raise ConfigError for a base that cannot be adapted."""

    @abstractmethod
    def new_embedding(self) -> nn.Module:
        """The new embedder: Xavier weights, bias zero."""

    @abstractmethod
    def swap(self, transformer: nn.Module) -> None:
        """Put a new embedder and head into a transformer, and their shape into its config."""

    @abstractmethod
    def embed(self, embedding: nn.Module, latents: torch.Tensor, old: bool) -> torch.Tensor:
        """Tokens `[B, D, h, w]` of latents `[B, C, H, W]`, with the old embedder or the new one."""

    @abstractmethod
    def old_latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of the old autoencoder as the model sees them, for pictures `[B, 3, H, W]` in [-1, 1]."""

    @abstractmethod
    def encode_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        """Prompts without padding."""

    @abstractmethod
    def count_tokens(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
        """The tokens of each prompt, as `text_length` counts them."""

    @property
    def prompt_frame(self) -> str:
        """What is put before every prompt."""
        return ""

    @property
    @abstractmethod
    def embedding_name(self) -> str:
        """Where the embedder lies in the transformer."""

    # -- Backbone ------------------------------------------------------------------------------------------------------

    def check_size(self, frames: int, height: int, width: int) -> str | None:
        if frames != 1:
            return f"clips of {frames} frames do not fit an image model: set frames: 1."
        if height % self.factor or width % self.factor:
            return f"{height}x{width} must be a multiple of {self.factor}, the autoencoder's factor."
        return None

    def student(self) -> nn.Module:
        transformer = self.transformer_class.from_pretrained(self.base, subfolder="transformer", dtype=self.dtype)
        self.swap(transformer)
        return transformer.requires_grad_(False)

    def aligner(self) -> ImageAligner:
        return ImageAligner(self, self.new_embedding(), "latents")

    def teacher(self) -> ImageAligner:
        embedding = load_part(self.transformer_class, self.base, self.embedding_name, self.dtype).float()
        return ImageAligner(self, embedding, "teacher").requires_grad_(False).to(self.device)

    def parts(self, align: bool) -> tuple[str, ...]:
        return ("latents", "teacher") if align else ("latents",)

    def encoder(self, parts: Sequence[str]) -> ImageEncoder:
        return ImageEncoder(self, tuple(parts))

    def text_encoder(self) -> ImageTextEncoder:
        return ImageTextEncoder(self)

    def load(self, *keep: str) -> DiffusionPipeline:
        """The base pipeline with only some of its components."""
        index = self.pipeline_class.load_config(self.base)
        every = [name for name, value in index.items() if isinstance(value, (list, tuple)) and value[0] is not None]
        absent = {name: None for name in every if name not in keep}
        return self.pipeline_class.from_pretrained(self.base, dtype=self.dtype, **absent)

    @abstractmethod
    def assemble(self, base: DiffusionPipeline, vae: nn.Module, transformer: nn.Module) -> DiffusionPipeline:
        """The DC-Gen pipeline, with the other components of the base."""

    def save(self, transformer: nn.Module, folder: Path) -> None:
        base = self.load("scheduler", *self.text_parts)
        vae = AutoencoderDC.from_pretrained(self.autoencoder_path)
        write_model(self.assemble(base, vae, transformer.to("cpu")), folder)

    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        pipe = self.assemble(self.load("scheduler"), self.autoencoder.to(self.device), transformer)
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe(
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pt",
            callback_on_step_end=request.callback,
            **self.prompt_inputs(*texts),
        ).images
        return pictures[0][:, None].float().cpu() * 2 - 1

    @abstractmethod
    def prompt_inputs(self, text: Text, negative: Text) -> dict[str, Any]:
        """Arguments of the pipeline for a prompt and a negative prompt."""


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


class ImageEncoder(Encoder):
    """ "latents" `[C, 1, H/f, W/f]` of the new autoencoder, scaled, and "teacher", those of the old one."""

    def __init__(self, backbone: ImageBackbone, parts: tuple[str, ...]) -> None:
        self.backbone, self.parts = backbone, parts
        self._old: nn.Module | None = None
        # Where they were loaded: it may be long before they run.
        models = {"latents": backbone.autoencoder, "teacher": self._loaded_old() if "teacher" in parts else None}
        self.identities = {name: f"image {name} 1, {fingerprint(models[name])}" for name in parts}

    @property
    def old(self) -> nn.Module:
        """The autoencoder of the base, in float32, where it runs."""
        return self._loaded_old().to(self.backbone.device)

    def _loaded_old(self) -> nn.Module:
        if self._old is None:
            self._old = self.backbone.vae_class.from_pretrained(self.backbone.base, subfolder="vae")
            self._old.requires_grad_(False).eval()
        return self._old

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, parts: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        parts = self.parts if parts is None else parts
        pictures = pixels[:, :, 0].to(self.backbone.device)
        made = {}
        if "latents" in parts:
            new = self.backbone.autoencoder.to(self.backbone.device)
            made["latents"] = new.encode(pictures.to(new.dtype)).latent.float() * new.config.scaling_factor
        if "teacher" in parts:
            made["teacher"] = self.backbone.old_latents(self.old, pictures)
        return {name: value[:, :, None] for name, value in made.items()}

    def release(self) -> None:
        self._old = None
        self.backbone.autoencoder.to("cpu")


class ImageTextEncoder(TextEncoder):
    """Encodes prompts as the base pipeline does."""

    def __init__(self, backbone: ImageBackbone) -> None:
        self.backbone = backbone
        self._pipe: DiffusionPipeline | None = None
        self.length = backbone.text_length
        parts = self._loaded().components
        names = [fingerprint(part) for name, part in parts.items() if name.startswith("text_encoder")]
        names += [tokenizer_fingerprint(part) for name, part in parts.items() if name.startswith("tokenizer")]
        self.identity = " ".join([*names, str(backbone.dtype), str(self.length), backbone.prompt_frame])

    @property
    def pipe(self) -> DiffusionPipeline:
        """A pipeline with nothing but tokenizers and text encoders, where it runs."""
        return self._loaded().to(self.backbone.device)

    def _loaded(self) -> DiffusionPipeline:
        if self._pipe is None:
            self._pipe = self.backbone.load(*self.backbone.text_parts)
        return self._pipe

    def count(self, prompts: Sequence[str]) -> list[int]:
        return self.backbone.count_tokens(self._loaded(), prompts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        return self.backbone.encode_prompts(self.pipe, prompts)

    def park(self) -> None:
        if self._pipe is not None:
            to_cpu(self._pipe)

    def release(self) -> None:
        self._pipe = None
