"""What image models have in common, with whichever autoencoder: their parts, prompts, and how they are called."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..config import ConfigError
from ..data.cache import fingerprint, tokenizer_fingerprint
from .base import Encoder, PretrainedModel, SampleRequest, Text, TextEncoder
from .folders import read_config, to_cpu


class ImageFamily(PretrainedModel):
    """An image pipeline in diffusers' layout. Images are clips of one frame.

    Args:
        base: folder or hub id of the pipeline.
        dtype: of the frozen weights.
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
    factor: int
    """What height and width must be a multiple of."""

    def __init__(
        self,
        base: str,
        dtype: torch.dtype,
        device: torch.device | str,
        merge_text_padding: bool,
        guidance: float,
    ) -> None:
        if merge_text_padding:
            raise ConfigError("model.merge_text_padding is for Wan text-to-video models: set it to false.")
        self.base, self.dtype, self.guidance = base, dtype, guidance
        self.device = torch.device(device)
        self.config = read_config(self.transformer_class, base, "transformer")

    @abstractmethod
    def check_base(self) -> None:
        """Raise ConfigError for a base that cannot be trained."""

    @abstractmethod
    def old_latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of the base's own autoencoder as the model sees them, for pictures `[B, 3, H, W]` in [-1, 1]."""

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

    @abstractmethod
    def prompt_inputs(self, text: Text, negative: Text) -> dict[str, Any]:
        """Arguments of the pipeline for a prompt and a negative prompt."""

    @abstractmethod
    def sampler(self, transformer: nn.Module) -> DiffusionPipeline:
        """A pipeline with the transformer that is trained, and without what encodes prompts."""

    # -- PretrainedModel -----------------------------------------------------------------------------------------------

    def check_size(self, frames: int, height: int, width: int) -> str | None:
        if frames != 1:
            return f"clips of {frames} frames do not fit an image model: set frames: 1."
        if height % self.factor or width % self.factor:
            return f"{height}x{width} must be a multiple of {self.factor}, the autoencoder's factor."
        return None

    def text_encoder(self) -> ImageTextEncoder:
        return ImageTextEncoder(self)

    def load(self, *keep: str) -> DiffusionPipeline:
        """The base pipeline with only some of its components."""
        index = self.pipeline_class.load_config(self.base)
        every = [name for name, value in index.items() if isinstance(value, (list, tuple)) and value[0] is not None]
        absent = {name: None for name in every if name not in keep}
        return self.pipeline_class.from_pretrained(self.base, dtype=self.dtype, **absent)

    def after_step(self, request: SampleRequest) -> Any:
        """`callback_on_step_end` of a pipeline."""
        return request.callback

    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        pipe = self.sampler(transformer)
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
    """

    def __init__(self, family: ImageFamily, dtype: torch.dtype = torch.float32) -> None:
        self.family, self.dtype = family, dtype
        self._own: nn.Module | None = None

    @property
    def own(self) -> nn.Module:
        """The autoencoder of the base, where it runs."""
        return self.loaded_own().to(self.family.device)

    def loaded_own(self) -> nn.Module:
        if self._own is None:
            self._own = self.family.vae_class.from_pretrained(self.family.base, subfolder="vae", dtype=self.dtype)
            self._own.requires_grad_(False).eval()
        return self._own

    def own_latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents of pictures `[B, 3, H, W]`, in float32."""
        own: Any = self.own
        return self.family.old_latents(own, pictures.to(self.dtype)).float()

    def release(self) -> None:
        self._own = None


class ImageTextEncoder(TextEncoder):
    """Encodes prompts as the base pipeline does."""

    def __init__(self, family: ImageFamily) -> None:
        self.family = family
        self._pipe: DiffusionPipeline | None = None
        self.length = family.text_length
        parts = self._loaded().components
        names = [fingerprint(part) for name, part in parts.items() if name.startswith("text_encoder")]
        names += [tokenizer_fingerprint(part) for name, part in parts.items() if name.startswith("tokenizer")]
        self.identity = " ".join([*names, str(family.dtype), str(self.length), family.prompt_frame])

    @property
    def pipe(self) -> DiffusionPipeline:
        """A pipeline with nothing but tokenizers and text encoders, where it runs."""
        return self._loaded().to(self.family.device)

    def _loaded(self) -> DiffusionPipeline:
        if self._pipe is None:
            self._pipe = self.family.load(*self.family.text_parts)
        return self._pipe

    def count(self, prompts: Sequence[str]) -> list[int]:
        return self.family.count_tokens(self._loaded(), prompts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        return self.family.encode_prompts(self.pipe, prompts)

    def park(self) -> None:
        if self._pipe is not None:
            to_cpu(self._pipe)

    def release(self) -> None:
        self._pipe = None
