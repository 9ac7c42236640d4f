"""Recipe `autoencoder`: trains an `AutoencoderDCV` on clips of videos."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ...autoencoders import AutoencoderDCV
from ..backbones.folders import load_autoencoder, write_model
from ..config import ConfigError, Settings, setting
from ..data.cache import fingerprint
from ..data.dataset import ClipDataset, open_dataset, sturdy_pixels
from ..data.held_out import HeldOut, hold_out
from ..data.sampler import ClipSampler, Pick, without
from ..generators import Generators, derive_seed
from ..identities import dataset_identity
from ..pictures import strips, write_picture, written_to
from ..reconstruction import LossSettings, Reconstruction, quality
from ..settings import PhaseSettings, RunSettings, SizeSettings
from .base import Batch, Clips, Phase, Recipe


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The autoencoder.

    Args:
        start: folder of a trained one to go on from; None for a new one of the fields below.
        latent_channels, block_out_channels, layers_per_block, chunk_size: of `AutoencoderDCV`.
        norm_gain: weight with which the norms of the residual blocks start; below 1 they start nearer to nothing.
    """

    start: str | None = setting(None, free=True)
    latent_channels: int = setting(32, low=1)
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024, 1024)
    layers_per_block: tuple[int, ...] = (0, 5, 10, 4, 4, 4, 4)
    chunk_size: int = setting(40, low=4)
    norm_gain: float = setting(1.0, above=0)


@dataclass(frozen=True)
class AutoencoderPhase(PhaseSettings):
    """A phase of the training.

    Args:
        name: of the phase.
        sizes: of its clips; None for those of `data`.
        train: "all", or "decoder", which leaves the latents as they are.
    """

    name: str = "train"
    sizes: tuple[SizeSettings, ...] | None = None
    train: Literal["all", "decoder"] = "all"


@dataclass(frozen=True)
class ValidationSettings(Settings):
    """What is measured on the side.

    Args:
        clips: how many clips; of a folder those of the first files, which are then not trained on.
        size: of these clips; None for the last of `data.sizes`.
    """

    clips: int = setting(4, low=1)
    size: SizeSettings | None = None


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(RunSettings):
    """Settings of the recipe `autoencoder`.

    Args:
        statistics_clips: clips over which the standard deviation of the latents is measured at the end.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    phases: tuple[AutoencoderPhase, ...] = (AutoencoderPhase(steps=100_000),)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    statistics_clips: int = setting(64, low=1)

    def check(self) -> Iterator[str]:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            yield f"phases are named {', '.join(names)}: give each a name of its own."
        if self.loss.adversarial and self.loss.discriminator_rate != 1:
            for number, phase in enumerate(self.phases):
                if phase.optimizer == "muon":
                    yield f"phases.{number}.optimizer is muon: with a discriminator_rate of its own, use adamw."
        factor = 2 ** (len(self.model.block_out_channels) - 2)
        where = [("data.sizes", self.data.sizes)]
        where += [(f"phases.{i}.sizes", phase.sizes or ()) for i, phase in enumerate(self.phases)]
        where += [("validation.size", (self.validation.size,) if self.validation.size else ())]
        for name, sizes in where:
            for size in sizes:
                if self.model.start is None and (size.height % factor or size.width % factor):
                    yield f"{name}: {size.height}x{size.width} is no multiple of {factor}, the autoencoder's factor."
                if size.frames % 4:
                    yield f"{name}: {size.frames} frames are no multiple of 4."


class TrainAutoencoder(Recipe):
    """Trains DC-AE-V (DC-VideoGen, arXiv 2509.25182, section 3.1) and writes it to `out/autoencoder`.

    The EMA weights are written where a phase has `ema_decay`. `scaling_factor` in its config is 1 / the standard
    deviation of the latents over the training set, or that of `model.start` where no phase trained the encoder.
    """

    Config = AutoencoderSettings
    config: AutoencoderSettings

    def prepare(self) -> None:
        config = self.config
        self.dataset = open_dataset(config.data, config.seed, True, need_captions=False, process=self.process)
        size = config.validation.size or config.data.sizes[-1]
        self.held_out = hold_out(self.dataset, (size,), config.validation.clips)
        self.build()  # the shape must be one that exists
        if config.loss.perceptual:
            from ..reconstruction import perceptual_network

            perceptual_network()

    def inputs(self) -> dict[str, str]:
        # Clips are cut at random, so no one else needs the hashes of their files, which take long.
        config = self.config
        start = {} if config.model.start is None else {"model.start": fingerprint(self.build())}
        return {
            f"{config.data.source} ({config.data.kind})": dataset_identity(self.dataset, config.data.sizes, False),
            **start,
        }

    def build(self) -> AutoencoderDCV:
        """The autoencoder as training starts."""
        settings = self.config.model
        if settings.start is not None:
            return load_autoencoder(AutoencoderDCV, settings.start, "model.start")
        try:
            autoencoder = AutoencoderDCV(
                latent_channels=settings.latent_channels,
                block_out_channels=settings.block_out_channels,
                layers_per_block=settings.layers_per_block,
                chunk_size=settings.chunk_size,
            )
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error
        if settings.norm_gain != 1:
            for name, module in autoencoder.named_modules():
                if name.endswith(".norm"):
                    nn.init.constant_(module.weight, settings.norm_gain)
        return autoencoder

    def phases(self) -> list[AutoencoderTraining]:
        return [AutoencoderTraining(self, settings) for settings in self.config.phases]

    def validation_clips(self) -> torch.Tensor:
        """The clips that are measured, `[B, 3, T, H, W]`."""
        return torch.stack([self.dataset.pixels(pick) for pick in self.held_out.picks])

    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        autoencoder = self.build()
        prefix = "autoencoder."
        weights = {k.removeprefix(prefix): v for k, v in trained.items() if k.startswith(prefix)}
        autoencoder.load_state_dict({**autoencoder.state_dict(), **weights})
        autoencoder.to(self.process.device).eval()
        facts: dict[str, Any] = {}
        if self._latents_are_new():
            facts["latent_std"] = self._deviation(autoencoder)
            autoencoder.register_to_config(scaling_factor=round(1 / facts["latent_std"], 6))
        folder = Path(self.config.out) / "autoencoder"
        write_model(autoencoder, folder)
        clips = self.validation_clips().to(self.process.device)
        with torch.no_grad():
            measured = quality(torch.cat([autoencoder(clip).sample for clip in clips.split(1)]), clips)
        return {"autoencoder": str(folder), **facts, **measured}

    def _latents_are_new(self) -> bool:
        """Whether they differ from those of `model.start`. Where they do not, models made for it need its scale."""
        trained = any(phase.steps and phase.train == "all" for phase in self.config.phases)
        return trained or self.config.model.start is None

    def _deviation(self, autoencoder: AutoencoderDCV) -> float:
        """Standard deviation of the latents over clips of the training set, in all sizes of `data`."""
        total = torch.zeros(3, dtype=torch.float64)
        clips = _Pixels(self.dataset, self.config.data.sizes, self.held_out)
        sampler = ClipSampler(clips.sizes, clips.members, 1, seed=derive_seed(self.config.seed, "statistics"))
        # Of more than one clip in sizes with a batch of their own.
        steps = sampler.micro_batches(0, self.config.statistics_clips)
        for pick in itertools.chain.from_iterable(steps):
            with torch.no_grad():
                latent = autoencoder.encode(clips.load(pick)["pixels"][None].to(self.process.device)).latent
            values = latent.double().cpu()
            total += torch.stack([torch.tensor(values.numel()), values.sum(), values.square().sum()])
        mean, square = total[1:] / total[0]
        return float((square - mean.square()).sqrt())


class AutoencoderTraining(Phase):
    """One phase of `TrainAutoencoder`."""

    def __init__(self, recipe: TrainAutoencoder, settings: AutoencoderPhase) -> None:
        super().__init__(settings.name, settings)
        self.recipe = recipe
        self.settings: AutoencoderPhase

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        autoencoder = self.recipe.build()
        if self.recipe.config.loop.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        module = Reconstruction(autoencoder, self.recipe.config.loss)
        module.load_state_dict({**module.state_dict(), **trained})
        if self.settings.train == "decoder":
            autoencoder.encoder.requires_grad_(False)
        return module

    def clips(self) -> Clips:
        sizes = self.settings.sizes or self.recipe.config.data.sizes
        return _Pixels(self.recipe.dataset, sizes, self.recipe.held_out)

    def loss(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        started = rng.places[0].step >= self.recipe.config.loss.adversarial_from
        return model(batch["pixels"], started)

    def learning_rate_scale(self, name: str) -> float:
        return self.recipe.config.loss.discriminator_rate if name.startswith("discriminator.") else 1.0

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        process = self.recipe.process
        clips = self.recipe.validation_clips().to(process.device)
        parts = []
        for clip in process.track(clips.split(1), "validation clips", len(clips)):
            process.check_stop()
            parts.append(model(clip, reconstruct=True).float())
        made = torch.cat(parts)
        if process.is_main:
            pairs = [clip for pair in zip(clips, made, strict=True) for clip in pair]
            with written_to(folder):
                write_picture(strips(pairs), folder / f"{step:08d}.png")
        return quality(made, clips)


class _Pixels:
    """The clips of a dataset as they are, without those held out."""

    def __init__(self, dataset: ClipDataset, sizes: tuple[SizeSettings, ...], held_out: HeldOut) -> None:
        self.dataset, self.sizes = dataset, sizes
        self.members = without(dataset.members(sizes), held_out.clips)

    def load(self, pick: Pick) -> Batch:
        return {"pixels": sturdy_pixels(self.dataset, pick, self.members, self.sizes)[0]}
