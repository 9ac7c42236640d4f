"""Recipe `autoencoder`: trains an `AutoencoderDCV` on clips of videos."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ... import demo
from ...autoencoders import AutoencoderDCV
from ..backbones.folders import load_autoencoder, located, read_config, write_model
from ..config import ConfigError, Settings, setting
from ..data.cache import fingerprint
from ..data.sampler import ClipSampler
from ..distributed.generators import derive_seed
from .base import Phase
from .reconstructing import (
    Pixels,
    ReconstructionPhase,
    ReconstructionSettings,
    ReconstructionTraining,
    TrainReconstruction,
)


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The autoencoder.

    Args:
        start: folder or hub id of a trained one to go on from, or "demo-dc" for the built-in one; None for a new one of
            the fields below.
        latent_channels, block_out_channels, layers_per_block, chunk_size: of `AutoencoderDCV`.
        norm_gain: weight with which the norms of the residual blocks start; below 1 they start nearer to nothing.
    """

    start: str | None = setting(None, free=True, place=True)
    latent_channels: int = setting(32, low=1)
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024, 1024)
    layers_per_block: tuple[int, ...] = (0, 5, 10, 4, 4, 4, 4)
    chunk_size: int = setting(40, low=4)
    norm_gain: float = setting(1.0, above=0)


@dataclass(frozen=True)
class AutoencoderPhase(ReconstructionPhase):
    """A phase of the training.

    Args:
        train: "all", or "decoder", which leaves the latents as they are.
    """

    train: Literal["all", "decoder"] = "all"


@dataclass(frozen=True, kw_only=True)
class AutoencoderSettings(ReconstructionSettings):
    """Settings of the recipe `autoencoder`.

    Args:
        statistics_clips: clips over which the standard deviation of the latents is measured at the end.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    phases: tuple[AutoencoderPhase, ...] = (AutoencoderPhase(steps=100_000),)
    statistics_clips: int = setting(64, low=1)

    def check(self) -> Iterator[str]:
        yield from super().check()
        if self.model.start is not None:
            return  # what it takes is in its own folder, see `TrainAutoencoder.prepare`
        factor = 2 ** (len(self.model.block_out_channels) - 2)
        for name, size in self.named_sizes():
            if size.height % factor or size.width % factor:
                yield f"{name}: {size.height}x{size.width} is no multiple of {factor}, the autoencoder's factor."
            if size.frames % 4:
                yield f"{name}: {size.frames} frames are no multiple of 4."


class TrainAutoencoder(TrainReconstruction):
    """Trains DC-AE-V (DC-VideoGen, arXiv 2509.25182, section 3.1) and writes it to `out/autoencoder`.

    The EMA weights are written where a phase has `ema_decay`. `scaling_factor` in its config is 1 / the standard
    deviation of the latents over the training set, or that of `model.start` where no phase trained the encoder.
    """

    Config = AutoencoderSettings
    config: AutoencoderSettings

    def prepare(self) -> None:
        if self.config.model.start is not None:
            self.check_sizes(self.build(), "model.start")
        super().prepare()

    def inputs(self) -> dict[str, str]:
        start = {} if self.config.model.start is None else {"model.start": fingerprint(self.build())}
        return self.dataset_input() | start

    def build(self) -> AutoencoderDCV:
        """The autoencoder as training starts."""
        settings = self.config.model
        if settings.start is not None:
            place = located(settings.start, "model.start", demo.DC, part="vae")
            found = read_config(AutoencoderDCV, place).get("_class_name")
            if found != AutoencoderDCV.__name__:
                raise ConfigError(f"model.start: {settings.start} is a {found}; give an {AutoencoderDCV.__name__}.")
            return load_autoencoder(AutoencoderDCV, place, "model.start")
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

    def phases(self) -> list[Phase]:
        return [AutoencoderTraining(self, settings) for settings in self.config.phases]

    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        autoencoder = self.trained(trained)
        facts: dict[str, Any] = {}
        if self._latents_are_new():
            facts["latent_std"] = self._deviation(autoencoder)
            autoencoder.register_to_config(scaling_factor=round(1 / facts["latent_std"], 6))
        folder = Path(self.config.out) / "autoencoder"
        write_model(autoencoder, folder)
        return {"autoencoder": str(folder), **facts, **self.measured(autoencoder)}

    def _latents_are_new(self) -> bool:
        """Whether they differ from those of `model.start`. Where they do not, models made for it need its scale."""
        trained = any(phase.steps and phase.train == "all" for phase in self.config.phases)
        return trained or self.config.model.start is None

    def _deviation(self, autoencoder: AutoencoderDCV) -> float:
        """Standard deviation of the latents over clips of the training set, in all sizes of `data`."""
        total = torch.zeros(3, dtype=torch.float64)
        clips = Pixels(self.dataset, self.config.data.sizes, self.held_out)
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


class AutoencoderTraining(ReconstructionTraining):
    """One phase of `TrainAutoencoder`."""

    settings: AutoencoderPhase

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        module: Any = super().setup(trained)
        if self.settings.train == "decoder":
            module.autoencoder.encoder.requires_grad_(False)
        return module
