"""What models have in common whose prompts their own pipeline encodes: its parts, and its prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch.nn import functional

from ..config import ConfigError
from ..data.cache import tokenizer_fingerprint
from .base import PretrainedModel, Text, TextEncoder, told_guidance
from .folders import read_config, to_cpu


class PipelineFamily(PretrainedModel):
    """A pipeline in diffusers' layout.

    Args:
        base: folder or hub id of the pipeline.
        dtype: of the frozen weights.
        device: where encoders run.
        merge_text_padding: must be False.
        guidance: what a model that is distilled on a guidance scale is told in training; None for the family's usual.

    Raises:
        ConfigError: something is missing or does not fit together.
    """

    pipeline_class: type[DiffusionPipeline]
    transformer_class: ClassVar[Any]
    vae_class: ClassVar[Any]
    text_parts: ClassVar[tuple[str, ...]]
    usual_guidance: ClassVar[float | None] = None
    """What distilled models are told where nothing is set."""
    pictured: ClassVar[bool] = False
    """The text encoder sees the first frame of a clip; see `encode_seeing`."""

    def __init__(
        self,
        base: str,
        dtype: torch.dtype,
        device: torch.device | str,
        merge_text_padding: bool,
        guidance: float | None,
    ) -> None:
        if merge_text_padding:
            raise ConfigError("model.merge_text_padding is for Wan text-to-video models: set it to false.")
        self.base, self.dtype = base, dtype
        self.device = torch.device(device)
        self.config = read_config(self.transformer_class, base, "transformer")
        self.guidance = told_guidance(base, self.config, guidance, self.usual_guidance)

    @abstractmethod
    def encode_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        """Prompts without padding."""

    def encode_seeing(
        self, pipe: DiffusionPipeline, prompts: Sequence[str], pictures: Sequence[torch.Tensor] | None
    ) -> list[Text]:
        """The same for prompts with pictures; see `TextEncoder.encode`."""
        raise NotImplementedError

    @abstractmethod
    def count_tokens(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
        """The tokens of each prompt, as `text_length` counts them."""

    @property
    def prompt_frame(self) -> str:
        """What is put before every prompt."""
        return ""

    def text_encoder(self) -> PipelineTextEncoder:
        return PipelineTextEncoder(self)

    def load(self, *keep: str) -> DiffusionPipeline:
        """The base pipeline with only some of its components."""
        index = self.pipeline_class.load_config(self.base)
        every = [name for name, value in index.items() if isinstance(value, (list, tuple)) and value[0] is not None]
        absent = {name: None for name in every if name not in keep}
        return self.pipeline_class.from_pretrained(self.base, dtype=self.dtype, **absent)


def padded(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """States `[B, n, D]` with as many positions as the longest of `[n, D]` has, and which of them count, `[B, n]`."""
    lengths = [state.shape[0] for state in states]
    longest = max(lengths)
    filled = [functional.pad(state, (0, 0, 0, longest - n)) for state, n in zip(states, lengths, strict=True)]
    return torch.stack(filled), (torch.arange(longest) < torch.tensor(lengths)[:, None]).float()


def without_padding(states: torch.Tensor, mask: torch.Tensor, base: str) -> list[torch.Tensor]:
    """The states that count, `[n, D]` of each prompt, on the CPU in float32.

    Args:
        states: `[B, L, D]`.
        mask: `[B, L]`, which of them count.
        base: for the message.

    Raises:
        ConfigError: the padding is not behind the prompts.
    """
    mask = mask.bool().cpu()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ConfigError(
            f"model.base: the tokenizer of {base} puts the padding before the prompts, and its pipeline takes it to be "
            "behind them: set padding_side to right in its tokenizer_config.json."
        )
    return [state[: int(valid.sum())].float().cpu().clone() for state, valid in zip(states, mask, strict=True)]


_ENCODERS = ("text_encoder", "connectors")
"""What names of the models begin with that encode prompts."""


class PipelineTextEncoder(TextEncoder):
    """Encodes prompts as the base pipeline does."""

    def __init__(self, family: PipelineFamily) -> None:
        self.family = family
        self._pipe: DiffusionPipeline | None = None
        self.length, self.pictured = family.text_length, family.pictured
        # Not loaded before they are needed: what reads prompts into tokens is small.
        encoders = [name for name in family.text_parts if name.startswith(_ENCODERS)]
        self._readers = family.load(*(name for name in family.text_parts if name not in encoders))
        parts = self._readers.components
        names = [self._named(name) for name in self._readers.components if name in encoders]
        names += [part.to_json_string() for name, part in parts.items() if name == "image_processor" and part]
        names += [tokenizer_fingerprint(part) for name, part in parts.items() if name.startswith("tokenizer")]
        self.identity = " ".join([*names, str(family.dtype), str(self.length), family.prompt_frame])

    def _named(self, name: str) -> str:
        family = self.family
        return family.fingerprints.of(family.base, name, family.dtype, lambda: getattr(self._loaded(), name))

    @property
    def pipe(self) -> DiffusionPipeline:
        """A pipeline with nothing but tokenizers and text encoders, where it runs."""
        return self._loaded().to(self.family.device)

    def _loaded(self) -> DiffusionPipeline:
        if self._pipe is None:
            self._pipe = self.family.load(*self.family.text_parts)
        return self._pipe

    def count(self, prompts: Sequence[str]) -> list[int]:
        return self.family.count_tokens(self._readers, prompts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], pictures: Sequence[torch.Tensor] | None = None) -> list[Text]:
        if self.pictured:
            return self.family.encode_seeing(self.pipe, prompts, pictures)
        return self.family.encode_prompts(self.pipe, prompts)

    def park(self) -> None:
        if self._pipe is not None:
            to_cpu(self._pipe)

    def release(self) -> None:
        self._pipe = None
