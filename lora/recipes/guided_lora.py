"""What the recipes share whose LoRA is told beta = 1 / guidance scale: the embedder, passes with and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pipelines.guidance_free.beta import BETA, BetaEmbedder, BetaSlot, no_slot, width_of
from ..adapters.adapter import without_lora
from ..adapters.lora_file import read_facts
from ..backbones.base import SampleRequest, Text
from ..config import ConfigError
from ..distributed.fsdp import DTYPES
from .base import Batch, load_trained
from .lora import FlowLora, TrainLora


class TrainGuided(TrainLora):
    """A recipe whose transformer has an embedder of beta, trained beside the LoRA."""

    beside = (f"{BETA}.linear.weight",)

    def check_transformer(self, skeleton: nn.Module) -> None:
        if refusal := no_slot(skeleton):
            raise ConfigError(f"model.base: {refusal}.")

    def earlier(self, path: Path, setting: str, recipe: str) -> dict[str, torch.Tensor]:
        weights = super().earlier(path, setting, recipe)
        then, now = read_facts(path, setting)["unconditional"], self.config.flow.unconditional
        if then != now:
            raise ConfigError(
                f'flow.unconditional is "{now}", and the LoRA in {setting}, {path}, turns away from "{then}": set that.'
            )
        return weights

    def plain_transformer(self) -> nn.Module:
        """The transformer without the embedder."""
        return super().transformer()

    def transformer(self) -> nn.Module:
        """The transformer with the embedder of beta, and with the LoRA where one is trained, as training starts."""
        transformer = self.plain_transformer()
        transformer.add_module(BETA, BetaEmbedder(width_of(transformer)))
        load_trained(transformer, self.start)
        return transformer


class GuidedLora(FlowLora):
    """A phase that trains such a transformer."""

    recipe: TrainGuided
    highest: float | None = None
    """Guidance scale at which a gated LoRA counts fully; None for one that is not gated."""

    def __init__(self, recipe: TrainGuided) -> None:
        super().__init__(recipe)
        self._slot: BetaSlot | None = None
        self._told: torch.Tensor | None = None
        """beta `[B]` of the last pass; None of one of the frozen base."""

    def trains(self, name: str) -> bool:
        return super().trains(name) or name.startswith(f"{BETA}.")

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        self.transformer: Any = super().setup(trained)
        embedder: Any = self.transformer.get_submodule(BETA)
        self._slot = BetaSlot(self.transformer, embedder, lambda: self._told, "default", self.highest)
        return self.transformer

    def of_base(
        self, model: nn.Module, shown: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text], batch: Batch
    ) -> torch.Tensor:
        """The velocity of the frozen base: the model with the LoRA off, beta not told, and attention dense, as it is in
        every teacher, whatever the method that the model is trained with."""
        self._told = None
        with without_lora(self.transformer), self.dense():
            return self.without_gradients(model, shown, sigma, texts, batch)

    def of_teacher(self, shown: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text], batch: Batch) -> torch.Tensor:
        """The velocity of the second transformer, which there must be."""
        assert self.teacher is not None
        return self.of_frozen(self.teacher, shown, sigma, texts, batch)

    @torch.no_grad()
    def of_frozen(
        self, transformer: nn.Module, shown: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text], batch: Batch
    ) -> torch.Tensor:
        """The velocity of a transformer that is not trained."""
        precision = DTYPES[self.recipe.config.loop.mixed_precision]
        with torch.autocast(shown.device.type, precision, enabled=precision != torch.float32):
            return self.recipe.backbone.velocity(transformer, shown, sigma, texts, batch).float()

    def guided(
        self,
        model: nn.Module,
        shown: torch.Tensor,
        sigma: torch.Tensor,
        texts: Sequence[Text],
        batch: Batch,
        beta: torch.Tensor,
        gradients: bool = True,
    ) -> torch.Tensor:
        """The velocity of the model at beta `[B]`, in one pass."""
        self._told = beta  # and stays told: checkpointed blocks run again for the gradients
        if not gradients:
            return self.without_gradients(model, shown, sigma, texts, batch)
        self.forget()
        return self.recipe.backbone.velocity(model, shown, sigma, texts, batch).float()

    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        self._told = torch.tensor([1 / max(1.0, request.guidance_scale)])
        return super().sample(transformer, texts, replace(request, guidance_scale=1.0))

    def close(self) -> None:
        if self._slot is not None:
            self._slot.remove()
        self.teacher = None
        super().close()
