"""Recipe `ae_adapt`: moves a pre-trained transformer to a deep-compression latent space.

Source: AE-Adapt-V (DC-VideoGen, arXiv 2509.25182, section 3.2). Phase `align` fits a new embedder to the tokens of the
old one, without the transformer; `head` trains embedder and head with everything else frozen; `lora` trains both and a
LoRA on the rest.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ... import demo
from ...pipelines.deep_compression.adapter_folder import DEFAULTS_FILE
from ...pipelines.files.locations import is_hub_id
from ..adapters.adapter import AdaptedModel, add_lora, merge, save_adapter
from ..backbones import open_backbone
from ..backbones.base import Backbone, Text
from ..backbones.folders import located, transformer_files
from ..checkpoints.written import replaced, save_text
from ..data.cache import fingerprint
from ..data.latents import Latents
from ..distributed.generators import Generators
from ..flow import noisy, sample_sigmas
from ..settings import PhaseSettings
from .ae_adapt_settings import AEAdaptSettings
from .base import Batch, Clips, Phase, load_trained
from .encoded_clips import EncodedClipsRecipe
from .flow_phase import FlowPhase, train_only

logger = logging.getLogger(__name__)

__all__ = ["AEAdapt", "AEAdaptSettings", "on_one_grid"]


class AEAdapt(EncodedClipsRecipe):
    """Writes `out/pipeline` (for `from_pretrained` of the DC-VideoGen pipelines) and `out/adapter` (what changed)."""

    Config = AEAdaptSettings
    config: AEAdaptSettings
    backbone: Backbone

    def prepare(self) -> None:
        phases = self.config.phases
        if not (phases.head.steps or phases.lora.steps) and self.process.is_main:
            logger.warning(
                "phases.head.steps and phases.lora.steps are 0: the result will be an embedding alone, with a head of "
                "zeros, and no model that makes pictures. Give one of these phases steps for that."
            )
        self.backbone = self._backbone()
        self.open_data()
        self.aligning = self._latents(align=True) if self.config.phases.align.steps else None
        self.flowing = self._latents(align=False)

    def _backbone(self) -> Backbone:
        model = self.config.model
        return open_backbone(
            self.pipeline_at(model.base, "model.base", demo.WAN),
            self._autoencoder(),
            dtype=getattr(torch, model.dtype),
            autoencoder_dtype=getattr(torch, model.autoencoder_dtype),
            device=self.process.device,
            merge_text_padding=model.merge_text_padding,
            guidance=model.guidance,
            autoencoder_tiling=model.autoencoder_tiling,
        )

    def _latents(self, align: bool) -> Latents:
        return self.latents(self.backbone.encoder(self.backbone.parts(align)))

    def used(self) -> list[Latents]:
        phases = self.config.phases
        used = [self.aligning] if self.aligning is not None else []
        return used + ([self.flowing] if phases.head.steps or phases.lora.steps else [])

    def phases(self) -> list[Phase]:
        phases = self.config.phases
        return [
            Align("align", phases.align, self),
            Flow("head", phases.head, self),
            Flow("lora", phases.lora, self),
        ]

    def transformer(self, trained: Mapping[str, torch.Tensor], phase: str = "lora") -> nn.Module:
        """The transformer with what was trained so far; for the phase `lora`, or once it was run, with the LoRA."""
        transformer = self.backbone.student()
        if phase == "lora":
            lora = self.config.phases.lora
            add_lora(transformer, self.backbone.lora_targets, lora.rank, lora.alpha)
        load_trained(transformer, trained)
        return transformer

    def inputs(self) -> dict[str, str]:
        return {
            "model.base": f"{transformer_files(self.backbone.base)} {self.text_encoder.identity}",
            "model.autoencoder": fingerprint(self.backbone.autoencoder),
            **self.data_identity(),
        }

    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        out = Path(self.config.out)
        with_lora = any(".lora_" in name for name in trained)
        transformer = self.transformer(trained, "lora" if with_lora else "head")
        weights = dict(transformer.named_parameters())
        untrained = [name for name in weights if name.startswith(self.backbone.trained_fully) and name not in trained]
        if untrained:
            logger.warning(
                "%s was not trained, so what is written makes no pictures: only the phases head and lora train it.",
                untrained[0],
            )
        self.write_adapter(weights, out / "adapter", AdaptedModel.of(transformer), finished=True)
        if with_lora:
            merge(transformer)
        for name, parameter in transformer.named_parameters():
            if name.startswith(self.backbone.trained_fully):
                parameter.data = parameter.data.to(getattr(torch, self.config.model.dtype))
        with replaced(out / "pipeline") as draft:
            self.backbone.save(transformer, draft)
            save_text(json.dumps(self.made_for(), indent=2) + "\n", draft / DEFAULTS_FILE)
        return {"pipeline": str(out / "pipeline"), "adapter": str(out / "adapter")}

    def write_adapter(
        self, weights: Mapping[str, torch.Tensor], folder: Path, model: AdaptedModel, finished: bool = False
    ) -> None:
        """Write what was trained as an adapter.

        Args:
            weights: parameters of the transformer by name.
            folder: where to.
            model: the transformer.
            finished: whether it is the result, beside whose pipeline it lies.
        """
        facts = self._facts(finished)
        if model.lora is not None:
            facts |= {"lora_rank": self.config.phases.lora.rank, "lora_alpha": self.config.phases.lora.alpha}
        save_adapter(weights, folder, self.backbone.trained_fully, facts, model)

    def _facts(self, finished: bool = True) -> dict[str, Any]:
        """What the adapter belongs to."""
        model = self.config.model
        named = model.base == demo.WAN or is_hub_id(model.base)
        base = model.base if named else str(Path(self.backbone.base).resolve())
        # That of a hub is found from anywhere; any other is copied into the pipeline of this run when it is finished.
        autoencoder = self._autoencoder()
        if not is_hub_id(autoencoder):
            autoencoder = "../pipeline/vae" if finished else str(Path(autoencoder).resolve())
        base_hash = transformer_files(self.backbone.base)
        return {"base": base, "base_hash": base_hash, "autoencoder": autoencoder, "defaults": self.made_for()}

    def _autoencoder(self) -> str:
        """Folder or hub id of the new autoencoder."""
        return located(self.config.model.autoencoder, "model.autoencoder", demo.DC, part="vae")


class Align(Phase):
    """Phase `align`: the new embedder learns to give, for clean latents, the tokens of the old one (averaged)."""

    def __init__(self, name: str, settings: PhaseSettings, recipe: AEAdapt) -> None:
        super().__init__(name, settings)
        self.recipe = recipe

    def outline(self) -> nn.Module:
        return self.recipe.backbone.aligner()

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        self.embedder = self.recipe.backbone.teacher()
        return self.recipe.backbone.aligner()

    def clips(self) -> Clips:
        return self.recipe.ready(self.recipe.aligning)

    def loss(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self._loss(model, self.recipe.aligning.complete(batch))

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            wanted = self.embedder(batch)
        made, wanted = on_one_grid(model(batch).float(), wanted)
        loss = functional.mse_loss(made, wanted)
        return loss, {"relative": loss.detach() / wanted.var()}

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        def measure(batch: Batch, _: Generators) -> dict[str, torch.Tensor]:
            loss, values = self._loss(model, batch)
            return {"loss": loss, **values}

        measured = self.recipe.measured(self.recipe.aligning)
        return measured.mean(measure, self.settings.batch_size, self.recipe.process)

    def close(self) -> None:
        self.embedder = None


def on_one_grid(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[B, D, T, H, W]` of both on one grid: the teacher's averaged to the student's for videos, the student's
    interpolated to the teacher's for images (DC-Gen, arXiv 2509.25180).

    Raises:
        ValueError: the grids do not divide.
    """
    if student.shape[2] == 1 and teacher.shape[2] == 1 and student.shape != teacher.shape:
        size = teacher.shape[3:]
        return functional.interpolate(student[:, :, 0], size, mode="bilinear", align_corners=False)[:, :, None], teacher
    grid = student.shape[2:]
    if teacher.shape[2] != grid[0] or teacher.shape[3] % grid[1] or teacher.shape[4] % grid[2]:
        raise ValueError(f"the teacher's tokens {list(teacher.shape[2:])} cannot be averaged to {list(grid)}.")
    return student, functional.adaptive_avg_pool3d(teacher, (grid[0], grid[1], grid[2]))


class Flow(FlowPhase):
    """Phases `head` and `lora`: flow matching in the new latent space."""

    recipe: AEAdapt

    def __init__(self, name: str, settings: PhaseSettings, recipe: AEAdapt) -> None:
        super().__init__(name, settings, recipe, recipe.config.flow.caption_dropout)
        self.error_is_loss = recipe.config.flow.object_weight == 1

    def outline(self) -> nn.Module:
        return self.recipe.backbone.skeleton()

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        recipe = self.recipe
        transformer: Any = recipe.transformer(trained, self.name)
        if recipe.config.loop.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        train_only(transformer, lambda name: name.startswith(recipe.backbone.trained_fully) or ".lora_" in name)
        self._model = AdaptedModel.of(transformer)
        return transformer

    def levels(self, rng: Generators, latents: torch.Tensor) -> torch.Tensor:
        flow = self.recipe.config.flow
        return sample_sigmas(rng, flow.shift, flow.logit_normal_share, flow.logit_mean, flow.logit_std)

    def flow_loss(
        self, model: nn.Module, batch: Batch, noise: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        latents, weight = batch["latents"], self.recipe.config.flow.object_weight
        made = self.recipe.backbone.velocity(model, noisy(latents, noise, sigma), sigma, texts, batch)
        error = (made.float() - (noise - latents)).square()
        plain = error.detach().mean(dim=(1, 2, 3, 4))
        if weight != 1:
            from ...demo.train_transformer import object_weights

            error = error * object_weights(latents, weight)
        return error.mean(), {"error": plain.mean()}

    def write_adapter(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        self.recipe.write_adapter(weights, folder / "adapter", self._model)
