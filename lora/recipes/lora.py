"""Recipe `lora`: an ordinary LoRA on an unchanged model of videos or images, by flow matching."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import demo
from ...attention.layout import VideoLayout
from ...attention.methods.description import describe
from ...generation.levers.methods import DENSE
from ...pipelines.acceleration.handle import Handle, accelerate
from ...pipelines.files.adapter_header import facts_of
from ...pipelines.files.locations import is_hub_id, is_single_file
from ...pipelines.files.run_folder import taken
from ...pipelines.files.single_file import LayoutError, SingleFileError, pipeline_of
from ..adapters.adapter import add_lora, layers_named
from ..adapters.foreign_lora import read_foreign
from ..adapters.lora_file import COMFYUI_FILE, FILE, lora_path, read_facts, read_lora, save_lora
from ..backbones import open_model
from ..backbones.base import ModelOptions, OwnModel, Text
from ..backbones.folders import transformer_files
from ..checkpoints.begun_from import START, named_anew
from ..config import ConfigError
from ..data.identities import file_identity
from ..data.latents import Latents
from ..distributed.fsdp import DTYPES
from ..distributed.generators import Generators
from ..flow import sample_levels
from ..footprint.memory import TrainingMemory, blocks_of, gpu_bytes, training_memory
from ..footprint.offload import offload, offloaded_numbers
from ..footprint.quantise import quantisation
from ..sparse_training import training_method
from .base import Batch, Phase, load_trained
from .encoded_clips import EncodedClipsRecipe
from .flow_phase import FlowPhase, train_only
from .lora_settings import LoraSettings

__all__ = ["LoraSettings", "TrainLora"]

logger = logging.getLogger(__name__)


class TrainLora(EncodedClipsRecipe):
    """Writes `out/adapter/pytorch_lora_weights.safetensors`, which stock diffusers and ComfyUI load."""

    Config = LoraSettings
    config: LoraSettings
    backbone: OwnModel
    beside: tuple[str, ...] = ()
    """Names of parameters that are trained beside the LoRA, and go into its file as they are."""

    def check_transformer(self, skeleton: nn.Module) -> None:
        """Raise ConfigError for a transformer that the recipe cannot train."""

    def prepare(self) -> None:
        config = self.config
        self.start_file = self.adapter_file(config.lora.start, START) if named_anew(self, START) else None
        self.quantisation = quantisation(config.model.quantise)
        self.backbone = self._model()
        self._check_density()
        layouts = [self.backbone.layout(s.frames, s.height, s.width) for s in config.data.sizes]
        skeleton = self.backbone.skeleton()
        self.check_transformer(skeleton)
        self.method = self.sparse_method(type(skeleton).__name__, layouts)
        self.layers = self._layers(skeleton)
        refusal = self.backbone.check_layers(self.layers)
        if refusal:
            raise ConfigError(f"lora.targets: {refusal}")
        self._say_where_the_rank_is_too_high(skeleton)
        self._say_what_it_takes(skeleton, layouts)
        self.base_hash = transformer_files(self.backbone.base, self.backbone.part)
        self.start = {} if self.start_file is None else self._started(self.start_file, skeleton)
        self.open_data()
        self.flowing = self.latents(self.backbone.encoder(), config.flow.unconditional)

    def sparse_method(self, transformer_class: str, layouts: Sequence[VideoLayout | None]) -> Any:
        """The method of the self-attention in training, or None for dense attention.

        Args:
            transformer_class: name of the transformer's class.
            layouts: the tokens of the clips, one a size.

        Raises:
            ConfigError: the model takes none, or one that cannot do a size.
        """
        chosen = self.config.attention
        return training_method(
            chosen.method,
            chosen.density,
            chosen.dense_layers,
            chosen.block_size,
            chosen.backend,
            transformer_class,
            layouts,
        )

    def _layers(self, skeleton: nn.Module) -> list[str]:
        """The layers of the transformer that get a LoRA."""
        model, targets = self.backbone, self.config.lora.targets
        if targets is not None:
            return layers_named(skeleton, targets, "lora.targets")
        usual = layers_named(skeleton, self.usual_targets, "lora.targets")
        return [layer for layer in usual if layer.startswith(model.lora_within)]

    @property
    def usual_targets(self) -> Sequence[str]:
        """Ends of the names of the layers that get a LoRA where the settings name none."""
        return self.backbone.lora_targets

    def _model(self) -> OwnModel:
        model = self.config.model
        options = ModelOptions(
            dtype=getattr(torch, model.dtype),
            autoencoder_dtype=getattr(torch, model.autoencoder_dtype),
            autoencoder_tiling=model.autoencoder_tiling,
            device=self.process.device,
            merge_text_padding=model.merge_text_padding,
            stage=model.stage,
            first_frame=model.first_frame,
            guidance=model.guidance,
            fps=self.config.data.fps,
        )
        return open_model(self._base(), self.config.recipe, options)

    def _base(self) -> str:
        """Folder or hub id of the base; of a single file, the folder that it is converted to."""
        model = self.config.model
        if not is_single_file(model.base):
            return self.pipeline_at(model.base, "model.base", *demo.MODELS)
        part = "transformer_2" if model.stage == "low_noise" else "transformer"
        components = self.pipeline_at(str(model.components), "model.components", *demo.MODELS)
        try:
            return str(self.process.main_first(lambda: pipeline_of(model.base, components, part)))
        except (SingleFileError, LayoutError, OSError) as error:
            raise ConfigError(f"model.base: {error}") from error

    def adapter_file(self, location: str | None, setting: str) -> Path | None:
        """The file of a LoRA that settings name, found once: the folder of a run may stand for another one later.

        Args:
            location: of it, or see `lora_path`.
            setting: that names it, for messages.
        """
        if location is None:
            return None
        path = lora_path(location, setting)
        if self.process.is_main and (told := taken(location, path)):
            logger.info("%s", told)
        return path

    def earlier(self, path: Path, setting: str, recipe: str) -> dict[str, torch.Tensor]:
        """A LoRA that was trained before, which must be of this base and have the same layers and rank.

        Args:
            path: of its file.
            setting: that names it, for messages.
            recipe: that must have made it.
        """
        facts = read_facts(path, setting)
        if facts["base_hash"] != self.base_hash:
            raise ConfigError(
                f"{setting}: {path} was trained on {facts['base']} ({facts['part']}), and "
                f"{self.config.model.base} has other weights: give the base that it was trained on."
            )
        if facts.get("recipe") != recipe:
            raise ConfigError(f"{setting}: {path} is of the recipe {facts.get('recipe')}: give one of {recipe}.")
        lora = self.config.lora
        if facts["rank"] != lora.rank:
            raise ConfigError(f"lora.rank is {lora.rank}, but the LoRA in {setting} has {facts['rank']}: set that.")
        model = self.backbone
        return read_lora(path, self.layers, model.file_name, lora.scale, setting, self.beside, model.file_rows)

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, not a LoRA."""
        return False

    @property
    def frozen_models(self) -> int:
        """How many models there are in memory beside what is trained."""
        return 1

    def memory(self, skeleton: nn.Module, layouts: Sequence[VideoLayout | None]) -> TrainingMemory:
        """What the training takes of each GPU at least.

        Args:
            skeleton: the transformer.
            layouts: the tokens of the clips, one a size.
        """
        config, train = self.config, self.config.train
        lora = sum(config.lora.rank * (shape[0] + shape[1:].numel()) for shape in self._shapes(skeleton).values())
        clips = [size.batch_size or train.batch_size for size in config.data.sizes]
        away, at_work = offloaded_numbers(skeleton, config.model.offload_blocks)
        itemsize = getattr(torch, config.model.dtype).itemsize
        sizes = [(layout.tokens, n) for layout, n in zip(layouts, clips, strict=True) if layout is not None]
        return training_memory(
            skeleton,
            sum(p.numel() for p in skeleton.parameters()) if self.trains_all else lora,
            train,
            weight_bytes=itemsize,
            offloaded=(away - at_work) * itemsize,
            linear_bytes=None if config.model.quantise == "none" else 1,
            copies=self.frozen_models,
            shared_by=self.process.count if self.process.sharded else 1,
            layers=len(blocks_of(skeleton)),
            width=self.backbone.config.get("num_attention_heads", 0)
            * self.backbone.config.get("attention_head_dim", 0),
            sizes=sizes,
            activation_bytes=DTYPES[config.loop.mixed_precision].itemsize,
            checkpointed=config.loop.gradient_checkpointing,
        )

    def _shapes(self, skeleton: nn.Module) -> dict[str, torch.Size]:
        """Of the weights of the layers that get a LoRA, by their names."""
        layers: dict[str, Any] = dict(skeleton.named_modules())
        return {name: layers[name].weight.shape for name in self.layers}

    def _say_where_the_rank_is_too_high(self, skeleton: nn.Module) -> None:
        """A product of two matrices can be any matrix from the smaller side of the layer on."""
        rank = self.config.lora.rank
        sides = {name: min(shape[0], shape[1:].numel()) for name, shape in self._shapes(skeleton).items()}
        full = {name: side for name, side in sides.items() if side < rank}
        if not full or self.trains_all or not self.process.is_main:
            return
        least = min(full, key=lambda name: full[name])
        logger.warning(
            "lora.rank is %d, and %d of %d layers are smaller: %s has a side of %d, above which a rank adds nothing to "
            "it. The largest that is of use to any of the layers is %d.",
            rank, len(full), len(sides), least, full[least], max(sides.values()),
        )  # fmt: skip

    def _say_what_it_takes(self, skeleton: nn.Module, layouts: Sequence[VideoLayout | None]) -> None:
        """Before clips are encoded, which may take hours."""
        if not self.process.is_main:
            return
        needed, there = self.memory(skeleton, layouts), gpu_bytes(self.process.device)
        self.process.progress.say(f"{needed}")
        if there is not None and needed.total > there:
            logger.warning(
                "This GPU has %.1f GB: spread the weights over GPUs (FSDP), keep them in 8 bits (model.quantise), set "
                "loop.gradient_checkpointing, or give smaller clips.", there / 1e9,
            )  # fmt: skip

    def _started(self, path: Path, skeleton: nn.Module) -> dict[str, torch.Tensor]:
        """The LoRA to go on from: one of this recipe, or of another tool."""
        setting, lora = START, self.config.lora
        if self.beside or facts_of(path) or not path.is_file():  # of which diffusers would ask the hub
            return self.earlier(path, setting, self.config.recipe)
        shapes = self._shapes(skeleton)
        found = read_foreign(path, self.backbone.lora_loader, shapes, lora.rank, lora.scale, setting)
        if self.process.is_main:
            logger.warning(
                "%s: %s does not say which weights it was trained on: it is taken to be those of %s.",
                setting, path, self.config.model.base,
            )  # fmt: skip
        return found

    @property
    def trained_levels(self) -> tuple[float, float]:
        """The lowest and the highest noise level of the training."""
        flow, (low, high) = self.config.flow, self.backbone.levels
        return max(low, flow.min_level), min(high, flow.max_level)

    def _check_density(self) -> None:
        """Raise ConfigError for numbers of a density that is not the model's, and levels that it is not used for."""
        low, high = self.trained_levels
        if low >= high:
            wanted, own = self.config.flow, self.backbone.levels
            raise ConfigError(
                f"flow.min_level and flow.max_level are {wanted.min_level:g} and {wanted.max_level:g}, and "
                f"{self.backbone.base} is trained here for the levels {own[0]:g} to {own[1]:g} alone: give some of "
                "these."
            )
        flow, usual = self.config.flow, self.backbone.density
        if flow.density is None and usual == "uniform" and (flow.logit_mean, flow.logit_std) != (0.0, 1.0):
            raise ConfigError(
                f"flow.logit_mean and flow.logit_std are of no use: the noise levels of {self.backbone.base} are "
                "uniform. Set flow.density to logit_normal, or leave them out."
            )

    @property
    def backend(self) -> str:
        """What computes sparse attention in training."""
        return self.config.attention.backend

    def used(self) -> list[Latents]:
        return [self.flowing]

    def phases(self) -> list[Phase]:
        return [FlowLora(self)]

    def inputs(self) -> dict[str, str]:
        model, began = self.backbone, self.began_with or {}
        encoders = " ".join(sorted(self.flowing.identities.values()))
        start = began.get(START) if self.start_file is None else file_identity(self.start_file)
        return {
            "model.base": f"{self.base_hash} {model.levels} {self.text_encoder.identity} {encoders}",
            **({} if start is None else {START: start}),
            **self.data_identity(),
        }

    def transformer(self) -> nn.Module:
        """The frozen transformer with the LoRA as training starts."""
        lora = self.config.lora
        transformer = self.backbone.transformer(self.quantisation)
        add_lora(transformer, self.layers, lora.rank, lora.rank if lora.alpha is None else lora.alpha, lora.dropout)
        # What lies beside the LoRA is not in the transformer yet; the recipe that has it puts it there.
        load_trained(transformer, {name: value for name, value in self.start.items() if name not in self.beside})
        return transformer

    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"lora": str(self.write(trained, Path(self.config.out) / "adapter"))}

    def write(self, weights: Mapping[str, torch.Tensor], folder: Path) -> Path:
        """Write the LoRA among the weights into a folder."""
        lora, model = self.config.lora, self.backbone
        dtype, facts = getattr(torch, lora.file_dtype), self.facts()
        if model.comfyui_name(self.layers[0]) is not None:
            save_lora(weights, folder / COMFYUI_FILE, model.comfyui_name, lora.scale, facts, dtype, self.beside)
        return save_lora(
            weights, folder / FILE, model.file_name, lora.scale, facts, dtype, self.beside, model.file_rows
        )

    def facts(self) -> dict[str, Any]:
        """What the header of the file says: which model the LoRA is for, and what it was trained with."""
        config, model, size = self.config, self.config.model, self.config.data.sizes[-1]
        named = model.base in demo.MODELS or (is_hub_id(model.base) and not is_single_file(model.base))
        attention = config.attention
        return {
            "recipe": config.recipe,
            "base": model.base if named else Path(model.base).resolve().name,
            "base_hash": self.base_hash,
            "part": self.backbone.part,
            "transformer": str(self.backbone.config["_class_name"]),
            "levels": list(self.backbone.levels),
            "rank": config.lora.rank,
            "attention": {
                **({"method": DENSE} if attention.method == DENSE else describe(self.method)),
                "density": attention.density,
                "dense_layers": attention.dense_layers,
            },
            "guidance_preserving": config.flow.guidance_preserving,
            "unconditional": config.flow.unconditional,
            "size": {"frames": size.frames, "height": size.height, "width": size.width},
        }


class FlowLora(FlowPhase):
    """The phase `train`."""

    recipe: TrainLora

    def __init__(self, recipe: TrainLora) -> None:
        config = recipe.config
        super().__init__("train", config.train, recipe, config.flow.caption_dropout, config.flow.unconditional)
        self._handle: Handle | None = None
        self._turn = 0  # of methods whose plans differ from step to step
        if config.model.quantise != "none":
            self.whole_weights = f"model.quantise is {config.model.quantise}, whose matrices must be whole"
        if config.model.offload_blocks:
            self.whole_weights = f"model.offload_blocks is {config.model.offload_blocks}, which keeps weights whole"

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        recipe = self.recipe
        transformer: Any = recipe.transformer()
        load_trained(transformer, trained)
        if recipe.config.loop.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        train_only(transformer, self.trains)
        offload(transformer, recipe.config.model.offload_blocks)
        if recipe.method is not None:
            self._handle = accelerate(transformer, recipe.method, backend=recipe.backend)
        return transformer

    def outline(self) -> nn.Module:
        return self.recipe.backbone.skeleton()

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained."""
        return ".lora_" in name

    def levels(self, rng: Generators, latents: torch.Tensor) -> torch.Tensor:
        flow, backbone = self.recipe.config.flow, self.recipe.backbone
        shift = backbone.shift(latents) if flow.shift is None else flow.shift
        density = flow.density or backbone.density
        return sample_levels(rng, shift, density, flow.logit_mean, flow.logit_std, self.recipe.trained_levels)

    def flow_loss(
        self, model: nn.Module, batch: Batch, noise: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        backbone, scale = self.recipe.backbone, self.recipe.config.flow.guidance_preserving
        latents = batch["latents"]
        shown = backbone.noised(latents, noise, sigma)
        if scale is not None:
            without = self.without_gradients(model, shown, sigma, [self.nothing()] * len(shown), batch)
        self.forget()
        made = backbone.velocity(model, shown, sigma, texts, batch).float()
        if scale is not None:
            # GFT (arXiv 2501.15420) at the fixed beta = 1 / scale: what fits the flow is the model's mixture with its
            # unconditional self, so the model itself stays as guided as it was.
            made = made / scale + (1 - 1 / scale) * without
        loss = backbone.error(made, backbone.target(latents, noise, sigma)).mean()
        return loss, {"error": loss.detach()}

    @torch.no_grad()
    def without_gradients(
        self, model: nn.Module, shown: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text], batch: Batch
    ) -> torch.Tensor:
        """The velocity from the weights as they are, without dropout and gradients."""
        self.forget()
        training = model.training
        model.eval()
        try:
            return self.recipe.backbone.velocity(model, shown, sigma, texts, batch).float()
        finally:
            model.train(training)

    def loss(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self._turn = rng.places[0].step  # the same in all processes
        return super().loss(model, batch, rng)

    def forget(self) -> None:
        """Let sparse attention forget the last pass, which a resumed run would not remember."""
        if self._handle is not None:
            self._handle.begin_anew(self._turn)

    def dense(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block attention is dense, as that of a teacher."""
        return contextlib.nullcontext() if self._handle is None else self._handle.dense()

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        self._turn = 0
        self.forget()
        return super().validate(model, folder, step)

    def write_adapter(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        self.recipe.write(weights, folder / "adapter")

    def close(self) -> None:
        if self._handle is not None:
            self._handle.remove()
