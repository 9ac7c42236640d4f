"""Settings of the recipe `gft`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..config import Settings, setting
from .lora_settings import LoraSettings


@dataclass(frozen=True)
class GuidanceFreeSettings(Settings):
    """What the model learns of guidance.

    Args:
        train: "lora" trains a LoRA, "full" all weights; the embedder of beta is trained with both.
        loss: "white_box" regresses the guided velocity of the frozen base, which takes two more passes without
            gradients; "data" is that of the paper, against the flow of the clips, and takes one.
        max_scale: guidance scales of the training are uniform in [1, max_scale].
        gated: let the adapter count in proportion to scale - 1, as guidance does: at a scale of 1 the model is the
            base. Not in the paper, and only for LoRAs; None for true with one.
        unguided: share of the clips at a scale of 1, at which the model has to stay as it is; None for 0.15, and for 0
            where it is gated, of which these teach nothing.
    """

    train: Literal["lora", "full"] = "lora"
    loss: Literal["white_box", "data"] = "white_box"
    max_scale: float = setting(6.0, above=1)
    gated: bool | None = None
    unguided: float | None = setting(None, low=0, below=1)

    @property
    def unguided_share(self) -> float:
        """`unguided`, or its default."""
        return (0.0 if self.is_gated else 0.15) if self.unguided is None else self.unguided

    @property
    def is_gated(self) -> bool:
        """`gated`, or its default."""
        return self.train == "lora" if self.gated is None else self.gated

    def check(self) -> Iterator[str]:
        if self.gated and self.train == "full":
            yield "gated is true, which is for LoRAs: weights that are all trained cannot be. Leave it out."


@dataclass(frozen=True, kw_only=True)
class GuidanceFreeLoraSettings(LoraSettings):
    """Settings of the recipe `gft`: those of `lora`, and of guidance."""

    gft: GuidanceFreeSettings = field(default_factory=GuidanceFreeSettings)

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.gft.train == "full":
            yield from self.without_lora("gft.train")
        if self.flow.guidance_preserving is not None:
            yield "flow.guidance_preserving is for models that need no gft, being distilled on guidance: leave it out."
        if self.gft.loss == "data" and not self.gft.is_gated and not self.flow.caption_dropout:
            yield (
                "flow.caption_dropout is 0: with gft.loss data and gft.gated false, the model itself says what "
                "guidance turns away from, and must go on to learn it; give 0.1."
            )
        if self.validation.negative_prompt:
            yield (
                f'validation.negative_prompt is "{self.validation.negative_prompt}", which a guidance-free model '
                "cannot be given: set flow.unconditional to it, and leave it out here."
            )
        scale = self.validation.guidance_scale
        if self.validation.prompts and scale > self.gft.max_scale:
            yield f"validation.guidance_scale is {scale:g}, above gft.max_scale {self.gft.max_scale:g}: lower it."
