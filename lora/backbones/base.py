"""What the recipes must know of a model family, as it is (`OwnModel`) or moved to another autoencoder (`Backbone`)."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...attention.layout import VideoLayout
from ..config import ConfigError
from ..data.cache import Fingerprints
from ..flow import noisy

Text = dict[str, torch.Tensor]
"""A prompt as a model sees it: "states" `[n, D]`, and for some families "pooled" `[P]`."""


class PretrainedModel(ABC):
    """A pre-trained transformer with its own or another autoencoder, as training sees it.

    Latents are grids `[B, C, T, H, W]`; images have T = 1.

    Attributes:
        text_length: positions that prompts are padded to.
        image: whether the model starts from a picture.
        config: of the transformer.
        base: folder or hub id of the pipeline.
        rate: frames a second of the videos that the pipeline makes; None for images.
        fingerprints: what names the models that clips and prompts are encoded with.
    """

    base: str
    text_length: int
    image: bool = False
    config: Mapping[str, Any]
    rate: float | None = None
    fingerprints: Fingerprints = Fingerprints()
    _samplers: dict[nn.Module, Any] | None = None

    @property
    def takes_negative_prompts(self) -> bool:
        """Whether its samples turn away from a prompt; not of models that are distilled on guidance."""
        return True

    @abstractmethod
    def check_size(self, frames: int, height: int, width: int) -> str | None:
        """Why clips of this size cannot be trained on, or None."""

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
        """The model's prediction: of noise - latents, or what else `OwnModel.target` says.

        Args:
            model: the transformer, possibly wrapped.
            latents: noisy ones, `[B, C, T, H, W]`.
            sigma: their noise levels, `[B]` in [0, 1]; the model is given exactly the timestep of these.
            texts: of each clip's prompt.
            conditions: further parts of the batch, as the encoder made them.
        """

    @abstractmethod
    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        """A video `[3, T, H, W]` in [-1, 1].

        Args:
            transformer: that is trained.
            texts: of the prompt and of the negative prompt.
            request: everything else.
        """

    @abstractmethod
    def sampler(self, transformer: nn.Module) -> Any:
        """A pipeline with the transformer that is trained, and without what encodes prompts."""

    @contextlib.contextmanager
    def one_sampler(self) -> Iterator[None]:
        """A block in which samples of a transformer share one pipeline: of Wan 2.2 A14B, the other transformer would be
        read from the disk for each of them.
        """
        self._samplers = {}
        try:
            yield
        finally:
            self._samplers = None

    def sampler_of(self, transformer: nn.Module) -> Any:
        """`sampler`, or in the block `one_sampler` the one that was made there."""
        if self._samplers is None:
            return self.sampler(transformer)
        if transformer not in self._samplers:
            self._samplers[transformer] = self.sampler(transformer)
        return self._samplers[transformer]

    @abstractmethod
    def text_encoder(self) -> TextEncoder:
        """What encodes prompts."""


def encoded_how(dtype: torch.dtype, tiled: bool) -> str:
    """Behind the name of an autoencoder, how it encodes; nothing where that is in float32 and whole."""
    return f"{'' if dtype == torch.float32 else f' {dtype}'}{' tiled' if tiled else ''}"


@dataclass(frozen=True)
class ModelOptions:
    """How a model is trained as it is; a model refuses what it cannot do.

    Args:
        dtype: of the frozen weights.
        autoencoder_dtype: in which clips are encoded.
        autoencoder_tiling: encode large clips in tiles.
        device: where encoders run.
        merge_text_padding: let one position stand for the padding of a prompt: the same result, and faster where
            prompts are short. Of Wan without an image encoder.
        stage: of a base with two transformers, which one; None for a base with one.
        first_frame: train from first frames; None for what the class of the pipeline says.
        guidance: what a model that is distilled on a guidance scale is told in training; None for the family's usual.
        fps: frames a second of the clips, or None.
    """

    dtype: torch.dtype = torch.float32
    autoencoder_dtype: torch.dtype = torch.float32
    autoencoder_tiling: bool = False
    device: torch.device | str = "cpu"
    merge_text_padding: bool = False
    stage: str | None = None
    first_frame: bool | None = None
    guidance: float | None = None
    fps: float | None = None


class OwnModel(PretrainedModel):
    """A pre-trained model as it is, with the autoencoder that it was trained with.

    All of them are made of a folder or hub id and of `ModelOptions`, and raise ConfigError where something is missing
    or does not fit together; the message says what fits.

    Attributes:
        lora_targets: ends of the names of the layers that get a LoRA where nothing else is asked for.
        self_attention: those of the projections of self-attention alone; empty where they have no such names.
        lora_within: beginnings of these names.
        part: name of the transformer among the components of the pipeline.
        levels: the lowest and the highest noise level that the transformer is used for.
        density: of the noise levels where the settings leave it to the model, as `flow.density` names it.
        clean_first: the first latent frame is shown clean, and is no part of the loss.
    """

    lora_targets: tuple[str, ...]
    self_attention: tuple[str, ...] = ()
    lora_within: tuple[str, ...] = ("",)
    part: str = "transformer"
    levels: tuple[float, float] = (0.0, 1.0)
    density: str = "logit_normal"
    clean_first: bool = False

    @abstractmethod
    def transformer(self, quantisation: Any = None) -> nn.Module:
        """The transformer as it was trained, frozen.

        Args:
            quantisation: of its weights, as diffusers takes it; None for none.
        """

    def other_transformer(self) -> nn.Module:
        """Of a pipeline with two, the one that is not trained, as it is."""
        raise NotImplementedError(f"{type(self).__name__} has one transformer.")

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The transformer without weights, on the meta device, to look into before they are read."""

    def check_layers(self, layers: Sequence[str]) -> str | None:
        """Why a LoRA on these layers of the transformer cannot be, or None."""
        return None

    @property
    @abstractmethod
    def lora_loader(self) -> Any:
        """The class of pipelines that reads files of LoRAs for the model, whoever made them."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """What encodes clips into "latents" and whatever else `velocity` needs."""

    def layout(self, frames: int, height: int, width: int) -> VideoLayout | None:
        """The tokens of a clip as sparse attention sees them; None where the model has no sparse attention."""
        return None

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the model is shown: latents `[B, C, T, H, W]` at their noise levels `[B]`."""
        shown = noisy(latents, noise, sigma)
        if self.clean_first:
            shown[:, :, 0] = latents[:, :, 0]
        return shown

    def target(self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the model should predict for latents `[B, C, T, H, W]` at their noise levels `[B]`."""
        return noise - latents

    def shift(self, latents: torch.Tensor) -> float:
        """Of the noise levels towards noise, for latents `[B, C, T, H, W]`, where the settings leave it open."""
        return 3.0

    def error(self, made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Squared errors of the velocity where the model has to predict it, in float32."""
        error = (made.float() - wanted).square()
        return error[:, :, 1:] if self.clean_first else error

    def save(self, transformer: nn.Module, folder: Path) -> None:
        """Write a pipeline folder with a finished transformer in the place of its own; for models of videos."""
        raise NotImplementedError(f"{type(self).__name__} does not write whole pipelines.")

    @property
    def writes_pipelines(self) -> bool:
        """Whether there is a `save`, without which a recipe can train adapters alone."""
        return type(self).save is not OwnModel.save

    def file_name(self, layer: str) -> str:
        """The name under which files of LoRAs have a layer, so that diffusers and ComfyUI read them."""
        return f"transformer.{layer}"

    def file_rows(self, layer: str) -> tuple[slice, int] | None:
        """Where several layers are one in such files: the rows that are this one's, and their number in all. None for a
        layer of its own.
        """
        return None

    def comfyui_name(self, layer: str) -> str | None:
        """The name by which ComfyUI knows a layer, where it does not read `file_name`; None where it does, or has no
        such model.
        """
        return None


class Backbone(PretrainedModel):
    """A pre-trained transformer, its own autoencoder, and the deep-compression autoencoder it is moved to.

    Tokens are grids `[B, D, T, H, W]`; images have T = 1.

    Attributes:
        trained_fully: beginnings of the names of the parameters of the embedder and of the head.
        lora_targets: regular expression of the names of the layers that get a LoRA.
        factor: pixels of the new autoencoder's latents.
        autoencoder: the deep-compression one.
    """

    autoencoder: Any
    trained_fully: tuple[str, ...]
    lora_targets: str
    factor: int

    @property
    def inner(self) -> int:
        """Width of the tokens."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @abstractmethod
    def student(self) -> nn.Module:
        """The transformer with a new embedder (Xavier) and a new head (zero), all else as pre-trained."""

    @abstractmethod
    def skeleton(self) -> nn.Module:
        """The pre-trained transformer without weights, on the meta device, to look into its layers."""

    @abstractmethod
    def aligner(self) -> nn.Module:
        """The new embedder alone, as a module whose parameters are named as in the transformer. Called with a batch of
        parts, it gives tokens.
        """

    @abstractmethod
    def teacher(self) -> nn.Module:
        """The pre-trained embedder, frozen. Called with a batch of parts, it gives tokens."""

    @abstractmethod
    def save(self, transformer: nn.Module, folder: Path) -> None:
        """Write a pipeline folder with a finished transformer."""

    @abstractmethod
    def encoder(self, parts: Sequence[str]) -> Encoder:
        """What encodes clips into the named parts."""

    @abstractmethod
    def parts(self, align: bool) -> tuple[str, ...]:
        """Names of the parts that alignment needs, or that `velocity` and the loss need; "latents" among both."""


def told_guidance(base: str, config: Mapping[str, Any], given: float | None, usual: float | None) -> float | None:
    """What a distilled model is told of guidance in training; None for one that is told nothing.

    Args:
        base: for the message.
        config: of its transformer.
        given: in the settings, or None.
        usual: where nothing is.

    Raises:
        ConfigError: it is given to a model that is told nothing.
    """
    if config.get("guidance_embeds"):
        return usual if given is None else given
    if given is not None:
        raise ConfigError(
            f"model.guidance is {given:g}, but {base} is not told any: it is for models that are distilled on a "
            "guidance scale (guidance_embeds in the config of the transformer, as FLUX dev and HunyuanVideo have it). "
            "Leave it out."
        )
    return None


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
        pictured: it sees the first frame of a clip with its caption, so that the text of each clip is its own.
    """

    identity: str
    length: int
    pictured: bool = False

    @abstractmethod
    def count(self, prompts: Sequence[str]) -> list[int]:
        """The tokens of each prompt as `length` counts them, before anything is cut off."""

    @abstractmethod
    def encode(self, prompts: Sequence[str], pictures: Sequence[torch.Tensor] | None = None) -> list[Text]:
        """Each prompt on the CPU, without padding.

        Args:
            prompts: to encode.
            pictures: where it is `pictured`, what it sees with each, `[3, H, W]` in [-1, 1]; None for a black one, as
                pipelines show it with negative prompts.
        """

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
        scheduler: of the sampler; None for the model's own. Of Wan alone.
    """

    frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int
    image: torch.Tensor | None = None
    after_step: Callable[[], None] = lambda: None
    scheduler: Any = None

    def callback(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """`callback_on_step_end` of a pipeline."""
        self.after_step()
        return tensors
