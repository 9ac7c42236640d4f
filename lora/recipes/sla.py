"""Recipe `sla`: a model learns to do with few blocks of attention, and with linear attention for the rest (SLA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...attention import SLA, DenseSchedule
from ...attention.backends import check_backend
from ...attention.layout import VideoLayout
from ...pipelines.acceleration.families import find_transformers
from ...pipelines.acceleration.sla_weights import (
    SLAError,
    TrainedSLA,
    add_projections,
    names_in,
    read_config,
    write_config,
)
from ...pipelines.files.weight_files import stated_config, transformer_files, transformer_tensors
from ..adapters.adapter import without_lora
from ..adapters.lora_file import read_facts
from ..backbones.base import Text
from ..checkpoints.written import replaced
from ..config import ConfigError
from ..distributed.fsdp import DTYPES
from ..distributed.generators import Generators
from ..sparse_training import check_takes_sparse
from .base import Batch, Phase, load_trained
from .lora import FlowLora, TrainLora
from .sla_settings import SLASettings


class TrainSLA(TrainLora):
    """Writes `out/pipeline`, with all weights, or `out/adapter`; `vidaccel.accelerate(pipe, "sla")` takes both."""

    Config = SLASettings
    config: SLASettings
    method: SLA
    start_model: str | None
    """Folder or hub id of what `sla.start` names."""

    def _check_start(self, start: str) -> None:
        """Raise ConfigError where what the training is to go on from is of another model, or does something else."""
        setting, base, part = "sla.start", self.backbone.base, self.backbone.part
        try:
            trained = read_config(start, part)
        except SLAError as error:
            raise ConfigError(f"{setting}: {error}") from error
        if trained is None:
            raise ConfigError(
                f"{setting}: the {part} of {start} was not trained for SLA: leave it out, or give another."
            )
        if trained.base_hash and trained.base_hash != transformer_files(base, part):
            raise ConfigError(
                f"{setting}: {start} was trained from {trained.base}, and {self.config.model.base} has other weights: "
                "give the base that it was trained from."
            )
        if stated_config(start, part) != stated_config(base, part):
            raise ConfigError(
                f"{setting}: the {part} of {start} has another config than {self.config.model.base}: give one of it."
            )
        self._check_goes_on(trained, setting)

    def _check_goes_on(self, trained: TrainedSLA, setting: str) -> None:
        """Raise ConfigError where projections would be read as something that they are not.

        Density and blocks may change, which is what one goes on for.
        """
        sla = self.config.sla
        matters = ("linear_scope",) if sla.linear_scope == "none" else ("linear_scope", "feature_map")
        for name in matters:
            given, wanted = getattr(sla, name), getattr(trained, name)
            if given != wanted:
                raise ConfigError(f"{setting} was trained with {name} {wanted}, and sla.{name} is {given}: set that.")
        if sla.dense_layers < trained.dense_layers:
            raise ConfigError(
                f"sla.dense_layers is {sla.dense_layers}, but in {setting} the first {trained.dense_layers} layers "
                "stayed dense: set that, or more."
            )

    def earlier(self, path: Path, setting: str, recipe: str) -> dict[str, torch.Tensor]:
        facts = read_facts(path, setting)
        if facts.get("recipe") == recipe:
            self._check_goes_on(TrainedSLA.stated(facts.get("sla"), str(path)), setting)
        return super().earlier(path, setting, recipe)

    def phases(self) -> list[Phase]:
        return [SparseLinear(self)]

    def inputs(self) -> dict[str, str]:
        start = self.start_model
        own = {} if start is None else {"sla.start": transformer_files(start, self.backbone.part)}
        return {**super().inputs(), **own}

    @property
    def trains_all(self) -> bool:
        return self.config.sla.train == "full"

    def sparse_method(self, transformer_class: str, layouts: Sequence[VideoLayout | None]) -> SLA:
        check_takes_sparse(f"the recipe is {self.config.recipe}", transformer_class, layouts)
        sla = self.config.sla
        try:
            check_backend(sla.backend)
        except ValueError as error:
            raise ConfigError(f"sla: {error}") from error
        method = SLA(
            topk=sla.topk,
            block=(sla.block_q, sla.block_k),
            linear_scope=sla.linear_scope,
            feature_map=sla.feature_map,
            skip=sla.skip,
            eps=sla.eps,
            schedule=DenseSchedule(first_layers=sla.dense_layers),
        )
        self.tokens = sorted({layout.video_tokens for layout in layouts if layout is not None})
        for tokens in self.tokens:
            blocks = method.key_blocks(tokens)
            if not int(sla.topk * blocks):
                raise ConfigError(
                    f"sla.topk is {sla.topk:g}, of the {blocks} key blocks of {tokens:,} tokens less than one: give "
                    f"{1 / blocks:.4g} or more, or smaller blocks."
                )
        return method

    def check_transformer(self, skeleton: nn.Module) -> None:
        if self.trains_all and not self.backbone.writes_pipelines:
            raise ConfigError(
                f"sla.train is full, and all weights of a {type(skeleton).__name__} cannot be written: set it to lora."
            )
        base, part = self.backbone.base, self.backbone.part
        if read_config(base, part) is not None:
            raise ConfigError(
                f"model.base: the {part} of {self.config.model.base} was trained for SLA, and has no dense attention "
                "to learn from: give the model that it was trained from, and this one as sla.start."
            )
        given = self.config.sla.start
        self.start_model = None if given is None else self.pipeline_at(given, "sla.start")
        if self.start_model is not None:
            self._check_start(self.start_model)
        layers = self._sites(skeleton)
        if layers and self.config.sla.dense_layers >= len(layers):
            raise ConfigError(
                f"sla.dense_layers is {self.config.sla.dense_layers}, all {len(layers)} of the model: lower it."
            )
        self.beside = tuple(names_in(self._sparse(skeleton))) if self.config.sla.linear_scope != "none" else ()

    def _sites(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """The self-attention modules by path; none of a transformer without sparse attention."""
        try:
            [(found, family)] = find_transformers(transformer).values()
        except TypeError:
            return {}
        return family.modules(found)

    def _sparse(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Those that do not stay dense: a projection without a gradient would be one too many for several processes."""
        return dict(list(self._sites(transformer).items())[self.config.sla.dense_layers :])

    @property
    def backend(self) -> str:
        return self.config.sla.backend

    def transformer(self) -> nn.Module:
        """The transformer with its projections as training starts; with the LoRA where one is trained."""
        transformer = self.backbone.transformer() if self.trains_all else super().transformer()
        if self.method.needs_weights:
            add_projections(self._sparse(transformer), self.backbone.config["attention_head_dim"])
        load_trained(transformer, self.start)
        if self.start_model is not None:
            self._load_start(transformer, self.start_model)
        return transformer

    def _load_start(self, transformer: nn.Module, start: str) -> None:
        """The weights that the training goes on from: read anew each time, since they are as large as the model."""
        names = {name for name, _ in transformer.named_parameters()}
        tensors = transformer_tensors(start, names.__contains__, self.backbone.part)
        missing = sorted(names - set(tensors))
        if missing:
            raise ConfigError(
                f"sla.start: {start} lacks {len(missing)} weights, such as {missing[0]}: give a whole one."
            )
        load_trained(transformer, tensors)

    def trained_sla(self) -> TrainedSLA:
        """What the result was trained for."""
        facts = super().facts()
        return TrainedSLA.of(self.method, self.tokens, facts["base"], facts["base_hash"])

    def facts(self) -> dict[str, Any]:
        sla = self.config.sla
        return {**super().facts(), "sla": {**self.trained_sla().facts(), "train": sla.train, "loss": sla.loss}}

    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        if self.config.sla.train == "lora":
            return super().finish(trained)
        transformer = self.transformer()
        load_trained(transformer, trained)
        folder = Path(self.config.out) / "pipeline"
        with replaced(folder) as draft:
            self.backbone.save(transformer, draft)
            self.write_defaults(draft)
            write_config(draft / self.backbone.part, self.trained_sla())
        return {"pipeline": str(folder)}


class SparseLinear(FlowLora):
    """The phase `train`."""

    recipe: TrainSLA

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        transformer = super().setup(trained)
        self.transformer: Any = transformer
        if self.recipe.trains_all:
            self.teacher = self.recipe.backbone.transformer().eval()
        return transformer

    def trains(self, name: str) -> bool:
        return self.recipe.trains_all or name in self.recipe.beside or super().trains(name)

    def learning_rate_scale(self, name: str) -> float:
        return self.recipe.config.sla.projection_rate if name in self.recipe.beside else 1.0

    def flow_loss(
        self, model: nn.Module, batch: Batch, noise: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.forget()  # records of the step before
        if self.recipe.config.sla.loss == "flow":
            return super().flow_loss(model, batch, noise, sigma, texts)
        backbone = self.recipe.backbone
        shown = backbone.noised(batch["latents"], noise, sigma)
        wanted = self._dense(model, shown, sigma, texts, batch)
        made = backbone.velocity(model, shown, sigma, texts, batch).float()
        loss = backbone.error(made, wanted).mean()
        return loss, {"error": loss.detach()}

    def _dense(
        self, model: nn.Module, shown: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text], batch: Batch
    ) -> torch.Tensor:
        """The velocity of the frozen dense model: a second copy, or the model without its LoRA."""
        backbone, teacher = self.recipe.backbone, self.teacher
        if teacher is not None:
            precision = DTYPES[self.recipe.config.loop.mixed_precision]
            half = torch.autocast(shown.device.type, precision, enabled=precision != torch.float32)
            with torch.no_grad(), half:
                return backbone.velocity(teacher, shown, sigma, texts, batch).float()
        with without_lora(self.transformer), self.dense():
            return self.without_gradients(model, shown, sigma, texts, batch)

    def write_adapter(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        if self.recipe.config.sla.train == "lora":  # else the weights of the checkpoint are all there is
            super().write_adapter(folder, weights)

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """`off_dense` is |f - v|^2 / |v|^2, v the velocity of the dense model: what the sparsity still costs."""

        def measure(batch: Batch, rng: Generators) -> dict[str, torch.Tensor]:
            backbone, latents = self.recipe.backbone, batch["latents"]
            noise, sigma = rng.normal(*latents.shape[1:]), self.told_levels(rng, latents)
            shown = backbone.noised(latents, noise, sigma)
            wanted = self._dense(model, shown, sigma, batch["texts"], batch)
            made = self.without_gradients(model, shown, sigma, batch["texts"], batch)
            return {
                "gap": backbone.error(made, wanted).mean(),
                "square": backbone.error(torch.zeros_like(wanted), wanted).mean(),
            }

        values = super().validate(model, folder, step)
        recipe = self.recipe
        self.forget()
        found = recipe.measured(recipe.flowing).mean(measure, self.settings.batch_size, recipe.process)
        return values | ({"off_dense": found["gap"] / found["square"]} if found else {})
