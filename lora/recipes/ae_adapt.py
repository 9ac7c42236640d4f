"""Recipe `ae_adapt`: moves a pre-trained transformer to a deep-compression latent space.

Source: AE-Adapt-V (DC-VideoGen, arXiv 2509.25182, section 3.2). Phase `align` fits a new embedder to the tokens of the
old one, without the transformer; `head` trains embedder and head with everything else frozen; `lora` trains both and a
LoRA on the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ... import demo
from ...pipelines.deep_compression.adapted import DEFAULTS_FILE
from ...pipelines.locations import is_hub_id
from ..adapter import AdaptedModel, add_lora, merge, save_adapter
from ..backbones import open_backbone
from ..backbones.base import Backbone, SampleRequest
from ..backbones.folders import located, transformer_files
from ..checkpoint import replaced, save_text
from ..config import ConfigError
from ..data.cache import TensorCache, fingerprint
from ..data.dataset import open_dataset
from ..data.held_out import hold_out
from ..data.latents import Latents, say_what_is_cut
from ..flow import noisy, sample_sigmas
from ..fsdp import DTYPES
from ..generators import Generators
from ..identities import dataset_identity
from ..pictures import strips, write_picture, write_video, written_to
from ..settings import PhaseSettings
from .ae_adapt_settings import AEAdaptSettings
from .ae_adapt_validation import MeasuredClips
from .base import Batch, Clips, Phase, Recipe, load_trained

__all__ = ["AEAdapt", "AEAdaptSettings", "on_one_grid"]


class AEAdapt(Recipe):
    """Writes `out/pipeline` (for `from_pretrained` of the DC-VideoGen pipelines) and `out/adapter` (what changed)."""

    Config = AEAdaptSettings
    config: AEAdaptSettings

    def prepare(self) -> None:
        config = self.config
        self.backbone = self._backbone()
        for number, size in enumerate(config.data.sizes):
            refusal = self.backbone.check_size(size.frames, size.height, size.width)
            if refusal:
                raise ConfigError(f"data.sizes.{number}: {refusal}")
        if self.backbone.image and config.validation.prompts and not config.validation.clips:
            raise ConfigError("validation.clips is 0, but videos from prompts need their first frames: set it to 1.")
        self.dataset = open_dataset(config.data, config.seed)
        half = None if config.data.cache_dtype == "float32" else config.data.cache_dtype
        self.cache = TensorCache(config.data.cache, half) if config.data.cache else None
        self.text_encoder = self.backbone.text_encoder()
        if self.process.is_main:
            say_what_is_cut(self.dataset.captions(), self.text_encoder)
        self.held_out = hold_out(self.dataset, config.data.sizes, config.validation.clips)
        self.aligning = self._latents(align=True) if config.phases.align.steps else None
        self.flowing = self._latents(align=False)
        self._measured: dict[Latents, MeasuredClips] = {}

    def _backbone(self) -> Backbone:
        model = self.config.model
        return open_backbone(
            located(model.base, "model.base", demo.WAN),
            self._autoencoder(),
            dtype=getattr(torch, model.dtype),
            autoencoder_dtype=getattr(torch, model.autoencoder_dtype),
            device=self.process.device,
            merge_text_padding=model.merge_text_padding,
            guidance=model.guidance,
        )

    def _latents(self, align: bool) -> Latents:
        encoder = self.backbone.encoder(self.backbone.parts(align))
        sizes = self.config.data.sizes
        prompts = ("", *self.config.validation.prompts, self.config.validation.negative_prompt)
        return Latents(self.dataset, sizes, encoder, self.text_encoder, self.cache, self.held_out.clips, prompts)

    def encode(self) -> dict[str, Any]:
        data = self.config.data
        if data.cache is None:
            raise ConfigError("data.cache is missing: with --encode-only, say in which folder encodings are kept.")
        if self._endless():
            raise ConfigError("clips that are endless cannot be encoded beforehand: set data.clips.")
        self.prepare()
        phases = self.config.phases
        used = [self.aligning] if self.aligning is not None else []
        used += [self.flowing] if phases.head.steps or phases.lora.steps else []
        for latents in used:
            latents.fill(self.process)
        clips = {index for latents in used for indices in latents.members.values() for index in indices}
        return {"cache": data.cache, "clips": len(clips), "captions": len(self.dataset.captions())}

    @property
    def encodings(self) -> str | None:
        return None if self._endless() else self.config.data.cache

    def _endless(self) -> bool:
        """Whether every clip is a new one, of which none is kept."""
        return self.config.data.kind == "demo" and self.config.data.clips is None

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
        data = self.config.data
        return {
            "model.base": f"{transformer_files(self.backbone.base)} {self.text_encoder.identity}",
            "model.autoencoder": fingerprint(self.backbone.autoencoder),
            f"{data.source} ({data.kind})": dataset_identity(self.dataset, data.sizes),
        }

    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        out = Path(self.config.out)
        with_lora = any(".lora_" in name for name in trained)
        transformer = self.transformer(trained, "lora" if with_lora else "head")
        weights = dict(transformer.named_parameters())
        self.write_adapter(weights, out / "adapter", AdaptedModel.of(transformer), finished=True)
        if with_lora:
            merge(transformer)
        for name, parameter in transformer.named_parameters():
            if name.startswith(self.backbone.trained_fully):
                parameter.data = parameter.data.to(getattr(torch, self.config.model.dtype))
        with replaced(out / "pipeline") as draft:
            self.backbone.save(transformer, draft)
            save_text(json.dumps(self._defaults(), indent=2) + "\n", draft / DEFAULTS_FILE)
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
        base = model.base if model.base == demo.WAN or is_hub_id(model.base) else str(Path(model.base).resolve())
        # That of a hub is found from anywhere; any other is copied into the pipeline of this run when it is finished.
        autoencoder = self._autoencoder()
        if not is_hub_id(autoencoder):
            autoencoder = "../pipeline/vae" if finished else str(Path(autoencoder).resolve())
        return {"base": base, "autoencoder": autoencoder, "defaults": self._defaults()}

    def _defaults(self) -> dict[str, Any]:
        """The size and guidance that the model was made for."""
        size = self.config.data.sizes[-1]
        return {
            "frames": size.frames,
            "height": size.height,
            "width": size.width,
            "guidance_scale": self.config.validation.guidance_scale,
        }

    def _autoencoder(self) -> str:
        """Folder or hub id of the new autoencoder."""
        return located(self.config.model.autoencoder, "model.autoencoder", demo.DC, "vae")

    def ready(self, latents: Latents) -> Latents:
        """Encode what the cache lacks and the clips that are measured; before a model takes the memory for training."""
        latents.fill(self.process)
        self.measured(latents)
        return latents

    def measured(self, latents: Latents) -> MeasuredClips:
        """The clips that are measured, encoded once."""
        if latents not in self._measured:
            self._measured[latents] = MeasuredClips(self.dataset, self.held_out.picks, latents, self.backbone.image)
        return self._measured[latents]


class Align(Phase):
    """Phase `align`: the new embedder learns to give, for clean latents, the tokens of the old one (averaged)."""

    def __init__(self, name: str, settings: PhaseSettings, recipe: AEAdapt) -> None:
        super().__init__(name, settings)
        self.recipe = recipe

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        self.teacher = self.recipe.backbone.teacher()
        return self.recipe.backbone.aligner()

    def clips(self) -> Clips:
        return self.recipe.ready(self.recipe.aligning)

    def loss(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self._loss(model, self.recipe.aligning.complete(batch))

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            wanted = self.teacher(batch)
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
        self.teacher = None


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


class Flow(Phase):
    """Phases `head` and `lora`: flow matching in the new latent space."""

    def __init__(self, name: str, settings: PhaseSettings, recipe: AEAdapt) -> None:
        super().__init__(name, settings)
        self.recipe = recipe

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        recipe = self.recipe
        transformer: Any = recipe.transformer(trained, self.name)
        if recipe.config.loop.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        for name, parameter in transformer.named_parameters():
            trained_here = name.startswith(recipe.backbone.trained_fully) or ".lora_" in name
            parameter.requires_grad_(trained_here)
            if trained_here:
                parameter.data = parameter.data.float()
        self._model = AdaptedModel.of(transformer)
        return transformer

    def clips(self) -> Clips:
        return self.recipe.ready(self.recipe.flowing)

    def loss(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self._loss(model, self.recipe.flowing.complete(batch), rng)

    def _loss(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        flow = self.recipe.config.flow
        latents = batch["latents"]
        noise = rng.normal(*latents.shape[1:])
        sigma = sample_sigmas(rng, flow.shift, flow.logit_normal_share, flow.logit_mean, flow.logit_std)
        # The noise is that of the level which the model is told, not the other way round.
        sigma = self.recipe.backbone.told(sigma, DTYPES[self.recipe.config.loop.mixed_precision])
        dropped = (rng.uniform() < flow.caption_dropout).tolist()
        nothing = self.recipe.flowing.texts([""])[0]
        texts = [nothing if drop else text for drop, text in zip(dropped, batch["texts"], strict=True)]
        made = self.recipe.backbone.velocity(model, noisy(latents, noise, sigma), sigma, texts, batch)
        error = (made.float() - (noise - latents)).square()
        plain = error.detach().mean(dim=(1, 2, 3, 4))
        if flow.object_weight != 1:
            from ...demo.train_transformer import object_weights

            error = error * object_weights(latents, flow.object_weight)
        return error.mean(), {"error": plain.mean()}

    def write_adapter(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        self.recipe.write_adapter(weights, folder / "adapter", self._model)

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        def measure(batch: Batch, rng: Generators) -> dict[str, torch.Tensor]:
            return self._loss(model, batch, rng)[1]

        recipe = self.recipe
        values = recipe.measured(recipe.flowing).mean(measure, self.settings.batch_size, recipe.process)
        if recipe.config.validation.prompts:
            self._sample(getattr(model, "module", model), folder, step)
        return values

    def _sample(self, transformer: nn.Module, folder: Path, step: int) -> None:
        """Make videos from the prompts; for image to video, from the first frames of the measured clips, in turn."""
        recipe, settings = self.recipe, self.recipe.config.validation
        texts = recipe.flowing.texts([*settings.prompts, settings.negative_prompt])
        pictures = recipe.measured(recipe.flowing).first_frames
        last = recipe.config.data.sizes[-1]
        videos = []
        for number, text in enumerate(recipe.process.track(texts[:-1], "validation videos", len(texts) - 1)):
            image = pictures[number % len(pictures)] if pictures else None
            height, width = (last.height, last.width) if image is None else image.shape[1:]
            request = SampleRequest(
                last.frames,
                height,
                width,
                settings.steps,
                settings.guidance_scale,
                seed=number,
                image=image,
                after_step=recipe.process.check_stop,
            )
            videos.append(recipe.backbone.sample(transformer, (text, texts[-1]), request))
        if not recipe.process.is_main:
            return
        with written_to(folder):
            for number, video in enumerate(videos):
                if video.shape[1] > 1:
                    write_video(video, folder / f"{step:08d}_{number}.mp4", settings.fps)
            write_picture(strips(videos), folder / f"{step:08d}.png")
