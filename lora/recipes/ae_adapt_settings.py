"""Settings of the recipe `ae_adapt`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..config import Settings, setting
from ..settings import PhaseSettings, RunSettings, ValidationSettings, nothing_trained


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What is adapted to what.

    Args:
        base: folder or hub id of a diffusers pipeline; "demo" is the built-in one.
        autoencoder: folder or hub id of the deep-compression autoencoder; "demo-dc" is the built-in one.
        dtype: of the frozen weights; what is trained stays float32.
        autoencoder_dtype: in which clips are encoded.
        autoencoder_tiling: encode large clips in tiles, with both autoencoders: less memory, and other latents near the
            seams.
        merge_text_padding: let one position stand for the padding of a prompt, which changes nothing but the time;
            for Wan text to video.
        guidance: what models that are distilled on a guidance scale (FLUX dev) are told in training; None for 3.5.
    """

    base: str = setting(free=True, place=True)
    autoencoder: str = setting(free=True, place=True)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    autoencoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    autoencoder_tiling: bool = False
    merge_text_padding: bool = False
    guidance: float | None = setting(None, low=0)


@dataclass(frozen=True)
class FlowSettings(Settings):
    """Noise levels and prompts in training.

    Args:
        shift: of the noise levels towards noise; the published figures are 8 for text and 5 for image to video.
        logit_normal_share: share of the levels that follow a logit-normal density instead, of `logit_mean` and
            `logit_std`.
        caption_dropout: share of the prompts that are left out.
        object_weight: for the demo world: how much more the object counts in the loss than the background.
    """

    shift: float = setting(8.0, above=0)
    logit_normal_share: float = setting(0.0, low=0, high=1)
    logit_mean: float = 0.9
    logit_std: float = setting(0.9, above=0)
    caption_dropout: float = setting(0.1, low=0, high=1)
    object_weight: float = setting(1.0, low=1)


@dataclass(frozen=True)
class LoraPhase(PhaseSettings):
    """The phase `lora`.

    Args:
        rank, alpha: of the LoRA.
    """

    rank: int = setting(256, low=1)
    alpha: float = setting(512.0, above=0)


@dataclass(frozen=True)
class PhasesSettings(Settings):
    """The phases, with the published figures for text to video (14B)."""

    align: PhaseSettings = field(
        default_factory=lambda: PhaseSettings(steps=20_000, learning_rate=2e-4, betas=(0.9, 0.9), batch_size=4)
    )
    head: PhaseSettings = field(
        default_factory=lambda: PhaseSettings(steps=6_000, learning_rate=1e-4, max_grad_norm=0.1)
    )
    lora: LoraPhase = field(
        default_factory=lambda: LoraPhase(
            steps=8_000, learning_rate=5e-5, lr_warmup_steps=1_000, max_grad_norm=0.1, ema_decay=0.9999
        )
    )


@dataclass(frozen=True, kw_only=True)
class AEAdaptSettings(RunSettings):
    """Settings of the recipe `ae_adapt`."""

    model: ModelSettings
    flow: FlowSettings = field(default_factory=FlowSettings)
    phases: PhasesSettings = field(default_factory=PhasesSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)

    def check(self) -> Iterator[str]:
        yield from nothing_trained((self.phases.align, self.phases.head, self.phases.lora))
        if self.model.dtype != "float32" and self.loop.mixed_precision == "no":
            yield f'model.dtype is {self.model.dtype}: set loop.mixed_precision to "bf16" or "fp16" with it.'
        if self.flow.object_weight != 1 and self.data.kind != "demo":
            yield (
                f"flow.object_weight is {self.flow.object_weight:g}, of use only with data.kind demo, whose object "
                f"stands out from a plain background; data.kind is {self.data.kind}: set it to 1."
            )
