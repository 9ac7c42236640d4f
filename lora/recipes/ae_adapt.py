"""Recipe `ae_adapt`: moves a pre-trained transformer to a deep-compression latent space.

Source: AE-Adapt-V (DC-VideoGen, arXiv 2509.25182, section 3.2). Phase `align` fits a new embedder to the tokens of the
old one, without the transformer; `head` trains embedder and head with everything else frozen; `lora` trains both and a
LoRA on the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from ..adapter import add_lora, merge, save_adapter
from ..backbones import open_backbone
from ..backbones.base import Backbone, SampleRequest
from ..config import ConfigError, Settings, setting
from ..data.cache import TensorCache
from ..data.latents import Latents
from ..data.plan import Pick
from ..data.source import held_out, open_source
from ..draws import Draws, Place, derive_seed
from ..flow import noisy, sample_sigmas
from ..pictures import strips, write_picture, write_video
from ..settings import PhaseSettings, RunSettings, SizeSettings
from .base import Batch, Clips, Phase, Recipe, load_trained


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What is adapted to what.

    Args:
        base: folder or hub id of a diffusers pipeline; "demo" is the built-in one.
        autoencoder: folder or hub id of the deep-compression autoencoder.
        dtype: of the frozen weights; what is trained stays float32.
        autoencoder_dtype: in which clips are encoded.
        merge_text_padding: let one position stand for the padding of a prompt, which changes nothing but the time;
            for Wan text to video.
        guidance: what models that are distilled on a guidance scale (FLUX dev) are told in training.
    """

    base: str = setting()
    autoencoder: str = setting()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    autoencoder_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    merge_text_padding: bool = False
    guidance: float = setting(3.5, low=0)


@dataclass(frozen=True)
class FlowSettings(Settings):
    """Noise levels and prompts in training.

    Args:
        shift: of the noise levels towards noise; the published figures are 8 for text and 5 for image to video.
        focus: share of the levels that follow a logit-normal density instead, of `focus_mean` and `focus_std`.
        text_drop: share of the prompts that are left out.
        object_weight: for the demo world: how much more the object counts in the loss than the background.
    """

    shift: float = setting(8.0, above=0)
    focus: float = setting(0.0, low=0, high=1)
    focus_mean: float = 0.9
    focus_std: float = setting(0.9, above=0)
    text_drop: float = setting(0.1, low=0, high=1)
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
    head: PhaseSettings = field(default_factory=lambda: PhaseSettings(steps=6_000, learning_rate=1e-4, clip=0.1))
    lora: LoraPhase = field(
        default_factory=lambda: LoraPhase(steps=8_000, learning_rate=5e-5, warmup=1_000, clip=0.1, ema_decay=0.9999)
    )


@dataclass(frozen=True)
class ValidationSettings(Settings):
    """What is measured and made on the side.

    Args:
        clips: clips whose loss is measured; they are not trained on. 0 for none.
        prompts: of videos that are made; none for none. For image to video, the first frames of the clips are used.
        negative_prompt, steps, guidance_scale, fps: of these.
    """

    clips: int = setting(8, low=0)
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    steps: int = setting(20, low=1)
    guidance_scale: float = setting(5.0, low=1)
    fps: float = setting(16.0, above=0)


@dataclass(frozen=True, kw_only=True)
class AEAdaptSettings(RunSettings):
    """Settings of the recipe `ae_adapt`."""

    model: ModelSettings
    flow: FlowSettings = field(default_factory=FlowSettings)
    phases: PhasesSettings = field(default_factory=PhasesSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)

    def check(self) -> Iterator[str]:
        if self.model.dtype != "float32" and self.loop.mixed_precision == "no":
            yield f'model.dtype is {self.model.dtype}: set loop.mixed_precision to "bf16" or "fp16" with it.'


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
        self.source = open_source(config.data, config.seed)
        self.cache = TensorCache(config.data.cache) if config.data.cache else None
        self.text_encoder = self.backbone.text_encoder()
        self.held_out = held_out(self.source, config.data.sizes[-1], config.validation.clips)
        self.aligning = self._latents(align=True) if config.phases.align.steps else None
        self.flowing = self._latents(align=False)
        self._validation: dict[Latents, tuple[Batch, list[Place]]] = {}

    def _backbone(self) -> Backbone:
        model, base = self.config.model, self.config.model.base
        if base == "demo":
            from ...demo import path

            base = str(path())
        return open_backbone(
            base,
            model.autoencoder,
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
        return Latents(self.source, sizes, encoder, self.text_encoder, self.cache, self.held_out, prompts)

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

    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        out = Path(self.config.out)
        with_lora = any(".lora_" in name for name in trained)
        transformer = self.transformer(trained, "lora" if with_lora else "head")
        lora = self.config.phases.lora
        facts = {"base": self.config.model.base, "autoencoder": self.config.model.autoencoder}
        facts |= {"lora_rank": lora.rank, "lora_alpha": lora.alpha} if with_lora else {}
        save_adapter(transformer, out / "adapter", self.backbone.trained_fully, facts, with_lora)
        if with_lora:
            merge(transformer)
        for name, parameter in transformer.named_parameters():
            if name.startswith(self.backbone.trained_fully):
                parameter.data = parameter.data.to(getattr(torch, self.config.model.dtype))
        self.backbone.save(transformer, out / "pipeline")
        return {"pipeline": str(out / "pipeline"), "adapter": str(out / "adapter")}

    # -- validation ----------------------------------------------------------------------------------------------------

    def validation_batch(self, latents: Latents) -> tuple[Batch, list[Place]]:
        """The clips that are measured, encoded once, and their places."""
        if latents not in self._validation:
            self._validation[latents] = self._encoded(latents)
        return self._validation[latents]

    def _encoded(self, latents: Latents) -> tuple[Batch, list[Place]]:
        size = self.config.data.sizes[-1]
        picks = []
        for number, index in enumerate(self.held_out):
            count = len(self.held_out)
            place = Place(0, number, count, derive_seed("validation", number))
            picks.append(Pick(index, (size.frames, size.height, size.width), place))
        pixels = torch.stack([self.source.pixels(pick) for pick in picks])
        batch = {"pixels": pixels.to(self.process.device), "caption": [self.source.caption(p.index) for p in picks]}
        return latents.complete(batch), [pick.place for pick in picks]


class Align(Phase):
    """Phase `align`: the new embedder learns to give, for clean latents, the tokens of the old one (averaged)."""

    def __init__(self, name: str, settings: PhaseSettings, recipe: AEAdapt) -> None:
        super().__init__(name, settings)
        self.recipe = recipe

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        self.teacher = self.recipe.backbone.teacher()
        return self.recipe.backbone.aligner()

    def clips(self) -> Clips:
        self.recipe.aligning.fill(self.recipe.process)
        return self.recipe.aligning

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self._loss(model, self.recipe.aligning.complete(batch))

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.no_grad():
            wanted = self.teacher(batch)
        made, wanted = on_one_grid(model(batch).float(), wanted)
        loss = functional.mse_loss(made, wanted)
        return loss, {"relative": loss.detach() / wanted.var()}

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        if not self.recipe.held_out:
            return {}
        batch, _ = self.recipe.validation_batch(self.recipe.aligning)
        loss, values = self._loss(model, batch)
        return {"loss": float(loss), "relative": float(values["relative"])}

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
    return student, functional.adaptive_avg_pool3d(teacher, grid)


class Flow(Phase):
    """Phases `head` and `lora`: flow matching in the new latent space."""

    def __init__(self, name: str, settings: PhaseSettings, recipe: AEAdapt) -> None:
        super().__init__(name, settings)
        self.recipe = recipe

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        recipe = self.recipe
        transformer = recipe.transformer(trained, self.name)
        if recipe.config.loop.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        for name, parameter in transformer.named_parameters():
            trained_here = name.startswith(recipe.backbone.trained_fully) or ".lora_" in name
            parameter.requires_grad_(trained_here)
            if trained_here:
                parameter.data = parameter.data.float()
        return transformer

    def clips(self) -> Clips:
        self.recipe.flowing.fill(self.recipe.process)
        return self.recipe.flowing

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self._loss(model, self.recipe.flowing.complete(batch), draws)

    def _loss(self, model: nn.Module, batch: Batch, draws: Draws) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        flow = self.recipe.config.flow
        latents = batch["latents"]
        noise = draws.normal(*latents.shape[1:])
        sigma = sample_sigmas(draws, flow.shift, flow.focus, flow.focus_mean, flow.focus_std)
        dropped = (draws.uniform() < flow.text_drop).tolist()
        nothing = self.recipe.flowing.texts([""])[0]
        texts = [nothing if drop else text for drop, text in zip(dropped, batch["texts"], strict=True)]
        made = self.recipe.backbone.velocity(model, noisy(latents, noise, sigma), sigma, texts, batch)
        error = (made.float() - (noise - latents)).square()
        plain = error.detach().mean(dim=(1, 2, 3, 4))
        if flow.object_weight != 1:
            from ...demo.train_transformer import object_weights

            error = error * object_weights(latents, flow.object_weight)
        return error.mean(), {"error": plain.mean()}

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        recipe, values = self.recipe, {}
        batch: Batch = {}
        if recipe.held_out:
            batch, places = recipe.validation_batch(recipe.flowing)
            draws = Draws(places, recipe.process.device)
            values["error"] = float(self._loss(model, batch, draws)[1]["error"])
        settings = recipe.config.validation
        if settings.prompts:
            self._sample(getattr(model, "module", model), batch, folder, step)
        return values

    def _sample(self, transformer: nn.Module, batch: Batch, folder: Path, step: int) -> None:
        recipe, settings = self.recipe, self.recipe.config.validation
        size: SizeSettings = recipe.config.data.sizes[-1]
        texts = recipe.flowing.texts([*settings.prompts, settings.negative_prompt])
        videos = []
        for number, text in enumerate(texts[:-1]):
            pixels = batch.get("pixels")
            image = pixels[number % len(pixels), :, 0] if pixels is not None else None
            request = SampleRequest(
                size.frames, size.height, size.width, settings.steps, settings.guidance_scale, number, image
            )
            video = recipe.backbone.sample(transformer, (text, texts[-1]), request)
            videos.append(video)
            if recipe.process.is_main and video.shape[1] > 1:
                write_video(video, folder / f"{step:08d}_{number}.mp4", settings.fps)
        if recipe.process.is_main:
            write_picture(strips(videos), folder / f"{step:08d}.png")
