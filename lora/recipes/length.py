"""Recipe `length`: a LoRA with which a model makes videos longer than those it was trained on, by sparse attention.

After Radial Attention (arXiv 2506.19852, section 4.3): a LoRA on the projections of self-attention, trained on clips of
2 to 4 times the length under the mask that the videos will be made with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ... import demo
from ...generation.models.inspected import inspect_model
from ...pipelines.length.rotary import RiflexHandle, no_riflex, riflex
from ...pipelines.length.settings import Riflex
from ...pipelines.length.trained import RECIPE, TrainedLength, facts_of_length
from ..config import ConfigError
from .base import Phase
from .length_settings import LengthLoraSettings
from .lora import FlowLora, TrainLora

LONGEST = 4
"""Times the length of the base, up to which the method was published."""


class TrainLength(TrainLora):
    """Writes `out/adapter/pytorch_lora_weights.safetensors`, whose header has the mask that it belongs to."""

    Config = LengthLoraSettings
    config: LengthLoraSettings
    riflex: Riflex | None = None
    base_frames: int
    """Latent frames of the videos that the base was trained on."""

    @property
    def usual_targets(self) -> Sequence[str]:
        return self.backbone.self_attention

    def check_transformer(self, skeleton: nn.Module) -> None:
        if no_riflex(skeleton) or not self.backbone.self_attention:
            kind = type(skeleton).__name__
            raise ConfigError(f"model.base: the recipe length is for Wan and HunyuanVideo, and this is a {kind}.")
        longest, base = self.longest, self._base_pixel_frames()
        bound = f"the {base} of the base (length.base_frames)"
        if longest.frames <= base:
            raise ConfigError(
                f"data.sizes: the longest clips have {longest.frames} frames, no more than {bound}: give "
                f"{2 * base - 1}, for example."
            )
        if longest.frames > LONGEST * base:
            raise ConfigError(
                f"data.sizes: clips of {longest.frames} frames are more than {LONGEST} times {bound}: give at most "
                f"{LONGEST * base}."
            )
        frames = self._latent_frames(longest.frames)
        covered = self.backbone.config.get("rope_max_seq_len")  # of HunyuanVideo there is no bound
        if covered is not None and frames > covered:
            raise ConfigError(
                f"data.sizes: {longest.frames} frames make {frames} latent frames, and the rotary embedding of the "
                f"base covers {covered}: give shorter clips."
            )
        self.base_frames = self._latent_frames(base)
        if self.config.length.rope == "riflex":
            self.riflex = Riflex(self.base_frames, self.config.length.component)
            try:
                riflex(skeleton, self.riflex).remove()
            except ValueError as error:
                raise ConfigError(f"length: {error}") from error

    @property
    def longest(self) -> Any:
        """The size with the most frames; the last of them."""
        return max(reversed(self.config.data.sizes), key=lambda size: size.frames)

    def _base_pixel_frames(self) -> int:
        if self.config.length.base_frames is not None:
            return self.config.length.base_frames
        named = self.config.model.base  # the folder of a built-in model does not say how long its videos are
        model = named if named in demo.MODELS else self.backbone.base
        return int(inspect_model(model).call_defaults()["frames"])

    def _latent_frames(self, frames: int) -> int:
        layout = self.backbone.layout(frames, self.longest.height, self.longest.width)
        assert layout is not None  # of Wan and HunyuanVideo
        return layout.frames

    def trained(self) -> TrainedLength:
        """What the LoRA belongs to."""
        size = self.longest
        layout = self.backbone.layout(size.frames, size.height, size.width)
        expected = 1.0 if self.method is None else self.method.expected_density(layout)
        if expected is None:  # it depends on the content
            expected = self.config.attention.density
        return TrainedLength(self.method, expected, self.base_frames, layout.frames, self.riflex)

    def phases(self) -> list[Phase]:
        return [LengthLora(self)]

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "recipe": RECIPE, RECIPE: facts_of_length(self.trained())}


class LengthLora(FlowLora):
    """The phase `train`."""

    recipe: TrainLength

    def __init__(self, recipe: TrainLength) -> None:
        super().__init__(recipe)
        self._rope: RiflexHandle | None = None

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        transformer = super().setup(trained)
        if self.recipe.riflex is not None:
            self._rope = riflex(transformer, self.recipe.riflex)
        return transformer

    def close(self) -> None:
        if self._rope is not None:
            self._rope.remove()
        super().close()
