"""What `ae_adapt` must know of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Text = dict[str, torch.Tensor]
"""A prompt as a model sees it: "states" `[n, D]`, and for some families "pooled" `[P]`."""


class Backbone(ABC):
    """A pre-trained transformer, its own autoencoder, and the deep-compression autoencoder it is moved to.

    Tokens are grids `[B, D, T, H, W]`; images have T = 1.

    Attributes:
        trained_fully: beginnings of the names of the parameters of the embedder and of the head.
        lora_targets: regular expression of the names of the layers that get a LoRA.
        text_length: positions that prompts are padded to.
        factor: pixels of the new autoencoder's latents.
        image: whether the model starts from a picture.
        config: of the transformer.
        base: folder or hub id of the pipeline.
        autoencoder: the deep-compression one.
    """

    base: str
    autoencoder: Any
    trained_fully: tuple[str, ...]
    lora_targets: str
    text_length: int
    factor: int
    image: bool = False
    config: Mapping[str, Any]

    @property
    def inner(self) -> int:
        """Width of the tokens."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @abstractmethod
    def check_size(self, frames: int, height: int, width: int) -> str | None:
        """Why clips of this size cannot be trained on, or None."""

    @abstractmethod
    def student(self) -> nn.Module:
        """The transformer with a new embedder (Xavier) and a new head (zero), all else as pre-trained."""

    @abstractmethod
    def aligner(self) -> nn.Module:
        """The new embedder alone, as a module whose parameters are named as in the transformer. Called with a batch of
        parts, it gives tokens.
        """

    @abstractmethod
    def teacher(self) -> nn.Module:
        """The pre-trained embedder, frozen. Called with a batch of parts, it gives tokens."""

    def told(self, sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The noise levels nearest to `sigma`, `[B]`, that the model can be told when it computes in `dtype`."""
        return sigma

    @abstractmethod
    def velocity(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        texts: Sequence[Text],
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The model's prediction of noise - latents.

        Args:
            model: of `student`, possibly wrapped.
            latents: noisy ones, `[B, C, T, H, W]`.
            sigma: their noise levels, `[B]` in [0, 1]; the model is given exactly the timestep of these.
            texts: of each clip's prompt.
            conditions: further parts of the batch, as the encoder made them.
        """

    @abstractmethod
    def save(self, transformer: nn.Module, folder: Path) -> None:
        """Write a pipeline folder with a finished transformer."""

    @abstractmethod
    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        """A video `[3, T, H, W]` in [-1, 1].

        Args:
            transformer: of `student`.
            texts: of the prompt and of the negative prompt.
            request: everything else.
        """

    @abstractmethod
    def encoder(self, parts: Sequence[str]) -> Encoder:
        """What encodes clips into the named parts."""

    @abstractmethod
    def text_encoder(self) -> TextEncoder:
        """What encodes prompts."""

    @abstractmethod
    def parts(self, align: bool) -> tuple[str, ...]:
        """Names of the parts that alignment needs, or that `velocity` and the loss need; "latents" among both."""


class Encoder(ABC):
    """Encodes clips.

    Attributes:
        parts: what it makes.
        identities: for each part, what it follows from besides the clip.
    """

    parts: tuple[str, ...]
    identities: Mapping[str, str]

    @abstractmethod
    def encode(self, pixels: torch.Tensor, parts: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """The parts of clips `[B, 3, T, H, W]` in [-1, 1], without gradients; all, or only the named ones."""

    def release(self) -> None:  # noqa: B027 - small ones may stay
        """Give memory back; what is needed later is loaded again."""


class TextEncoder(ABC):
    """Encodes prompts.

    Attributes:
        identity: what a `Text` follows from besides the prompt.
        length: tokens at which a prompt is cut off.
    """

    identity: str
    length: int

    @abstractmethod
    def count(self, prompts: Sequence[str]) -> list[int]:
        """The tokens of each prompt as `length` counts them, before anything is cut off."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        """Each prompt on the CPU, without padding."""

    def park(self) -> None:  # noqa: B027 - small ones may stay
        """Leave the GPU, but stay in memory for the next `encode`."""

    def release(self) -> None:  # noqa: B027 - small ones may stay
        """Give memory back; what is needed later is loaded again."""


@dataclass(frozen=True)
class SampleRequest:
    """A video to make for the eye.

    Args:
        frames, height, width: its size.
        steps, guidance_scale: of the sampler.
        seed: of the noise.
        image: `[3, H, W]` in [-1, 1], for image to video.
        after_step: called after each step of the sampler; what it raises ends the video.
    """

    frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int
    image: torch.Tensor | None = None
    after_step: Callable[[], None] = lambda: None

    def callback(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end` of a pipeline."""
        self.after_step()
        return tensors
