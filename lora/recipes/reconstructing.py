"""What the recipes share that train a decoder of pixels on clips of videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...autoencoders.tiny import compression_of, frames_of
from ..config import ConfigError, Settings, setting
from ..data.account import say_what_the_data_are
from ..data.dataset import ClipDataset, open_dataset, sturdy_pixels
from ..data.held_out import HeldOut, hold_out
from ..data.sampler import Pick, without
from ..data.sheet import write_sheet
from ..generators import Generators
from ..identities import dataset_identity
from ..pictures import strips, write_picture, written_to
from ..reconstruction import LossSettings, Reconstruction, Wanted, quality
from ..settings import PhaseSettings, RunSettings, SizeSettings, nothing_trained
from .base import Batch, Clips, Phase, Recipe, check_taken


@dataclass(frozen=True)
class ReconstructionPhase(PhaseSettings):
    """A phase of the training.

    Args:
        name: of the phase.
        sizes: of its clips; None for those of `data`.
    """

    name: str = "train"
    sizes: tuple[SizeSettings, ...] | None = None


@dataclass(frozen=True)
class ValidationSettings(Settings):
    """What is measured on the side.

    Args:
        clips: how many clips, of files that are then not trained on; None for a tenth of all, 4 at most and 1 at least.
        size: of these clips; None for the last of `data.sizes`.
    """

    clips: int | None = setting(None, low=1)
    size: SizeSettings | None = None


@dataclass(frozen=True, kw_only=True)
class ReconstructionSettings(RunSettings):
    """Settings of such a recipe."""

    loss: LossSettings = field(default_factory=LossSettings)
    phases: tuple[ReconstructionPhase, ...] = (ReconstructionPhase(steps=100_000),)
    validation: ValidationSettings = field(default_factory=ValidationSettings)

    def check(self) -> Iterator[str]:
        yield from nothing_trained(self.phases)
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            yield f"phases are named {', '.join(names)}: give each a name of its own."
        if self.loss.adversarial and self.loss.discriminator_rate != 1:
            for number, phase in enumerate(self.phases):
                if phase.optimizer == "muon":
                    yield f"phases.{number}.optimizer is muon: with a discriminator_rate of its own, use adamw."

    def named_sizes(self) -> Iterator[tuple[str, SizeSettings]]:
        """Every size of clips, with where it stands."""
        where = [("data.sizes", self.data.sizes)]
        where += [(f"phases.{i}.sizes", phase.sizes or ()) for i, phase in enumerate(self.phases)]
        where += [("validation.size", (self.validation.size,) if self.validation.size else ())]
        for name, sizes in where:
            yield from ((name, size) for size in sizes)


class TrainReconstruction(Recipe):
    """Trains what `build` makes, in the phases of its settings, to give clips back."""

    config: ReconstructionSettings

    def prepare(self) -> None:
        config = self.config
        self.dataset = open_dataset(config.data, config.seed, True, need_captions=False, process=self.process)
        size = config.validation.size or config.data.sizes[-1]
        self.held_out = hold_out(
            self.dataset, (size,), config.validation.clips, self.seed_of_held_out, usual=4, least=1
        )
        if self.process.is_main:
            for sizes in dict.fromkeys(p.sizes or config.data.sizes for p in config.phases if p.steps):
                say_what_the_data_are(self.dataset, sizes, self.held_out, self.process.progress.say)
        self.build()  # the shape must be one that exists
        if config.loss.perceptual:
            from ..reconstruction import perceptual_network

            perceptual_network()

    def check_sizes(self, vae: Any, setting: str) -> None:
        """Before anything is trained, that an autoencoder takes clips of all sizes.

        Args:
            setting: where it is from, for messages.

        Raises:
            ConfigError: a size that it does not take, with what it does.
        """
        time, space = compression_of(vae)
        for name, size in self.config.named_sizes():
            if size.height % space or size.width % space:
                fits = "x".join(str(space * max(1, round(side / space))) for side in (size.height, size.width))
                raise ConfigError(
                    f"{name}: {size.height}x{size.width} is no multiple of {space}, by which the autoencoder of "
                    f"{setting} divides height and width: give {fits}."
                )
            counts = {frames_of(vae, latents) for latents in range(1, size.frames // time + 4)}
            if size.frames not in counts:
                near = [
                    max((n for n in counts if 0 < n < size.frames), default=0),
                    min(n for n in counts if n > size.frames),
                ]
                raise ConfigError(
                    f"{name}: {size.frames} frames are no whole number of latent frames of the autoencoder of "
                    f"{setting}: give {' or '.join(str(n) for n in near if n)}."
                )

    def show_data(self, folder: Path) -> None:
        data = self.config.data
        sizes = next((p.sizes for p in self.config.phases if p.steps and p.sizes), data.sizes)
        if file := write_sheet(self.dataset, sizes, self.held_out, data.contact_sheet, folder):
            self.process.progress.say(f"What some of the clips look like: {file}")

    def dataset_input(self) -> dict[str, str]:
        """Of `inputs`, the dataset. Clips are cut at random, so no one else needs the hashes of its files, which take
        long."""
        data = self.config.data
        identity = dataset_identity(self.dataset, data.sizes, False, self.process)
        return {f"{data.source} ({data.kind})": identity, **self.held_out_input()}

    def build(self) -> Any:
        """What is trained, as training starts, for `Reconstruction`."""
        raise NotImplementedError

    @property
    def wanted(self) -> Wanted | None:
        """What should be made of a clip; None for the clip itself."""
        return None

    def phases(self) -> list[Phase]:
        return [ReconstructionTraining(self, settings) for settings in self.config.phases]

    def validation_clips(self) -> torch.Tensor:
        """The clips that are measured, `[B, 3, T, H, W]`."""
        return torch.stack([self.dataset.pixels(pick) for pick in self.held_out.picks])

    def trained(self, weights: Mapping[str, torch.Tensor]) -> Any:
        """What `build` makes, with the weights that phases left; those of a discriminator are of no use any more.

        Raises:
            CheckpointError: one of them has a name that neither has.
        """
        model, prefix = self.build(), "autoencoder."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        others = [k for k in weights if not k.startswith((prefix, "discriminator."))]
        check_taken([*others, *(own.keys() - model.state_dict().keys())], len(weights), type(model).__name__)
        model.load_state_dict({**model.state_dict(), **own})
        return model.to(self.process.device).eval()

    @torch.no_grad()
    def measured(self, model: Any) -> dict[str, float]:
        """`quality` of the clips that are held out."""
        clips = self.validation_clips().to(self.process.device)
        return quality(torch.cat([model(clip).sample for clip in clips.split(1)]), clips)


class ReconstructionTraining(Phase):
    """One phase of a `TrainReconstruction`."""

    def __init__(self, recipe: TrainReconstruction, settings: ReconstructionPhase) -> None:
        super().__init__(settings.name, settings)
        self.recipe = recipe
        self.settings: ReconstructionPhase

    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        model = self.recipe.build()
        if self.recipe.config.loop.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        module = Reconstruction(model, self.recipe.config.loss, self.recipe.wanted)
        module.load_state_dict({**module.state_dict(), **trained})
        return module

    def outline(self) -> nn.Module:
        return self.recipe.build()

    def clips(self) -> Clips:
        sizes = self.settings.sizes or self.recipe.config.data.sizes
        return Pixels(self.recipe.dataset, sizes, self.recipe.held_out)

    def loss(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        started = rng.places[0].step >= self.recipe.config.loss.adversarial_from
        return model(batch["pixels"], started)

    def learning_rate_scale(self, name: str) -> float:
        return self.recipe.config.loss.discriminator_rate if name.startswith("discriminator.") else 1.0

    def clipped_with(self, name: str) -> str:
        return "discriminator" if name.startswith("discriminator.") else ""

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        recipe, process = self.recipe, self.recipe.process

        def pair(number: int) -> tuple[torch.Tensor, torch.Tensor]:
            clip = recipe.dataset.pixels(recipe.held_out.picks[number])[None]
            return clip, model(clip.to(process.device), reconstruct=True).float().cpu()

        pairs = process.shared(len(recipe.held_out.picks), pair, "validation clips")
        if not process.is_main:
            return {}
        with written_to(folder):
            write_picture(strips([clip[0] for each in pairs for clip in each]), folder / f"{step:08d}.png")
        clips, made = (torch.cat(side).to(process.device) for side in zip(*pairs, strict=True))
        return quality(made, clips)


class Pixels:
    """The clips of a dataset as they are, without those held out."""

    def __init__(self, dataset: ClipDataset, sizes: tuple[SizeSettings, ...], held_out: HeldOut) -> None:
        self.dataset, self.sizes = dataset, sizes
        self.members = without(dataset.members(sizes), held_out.clips)
        self.decodes = True

    def load(self, pick: Pick) -> Batch:
        return {"pixels": sturdy_pixels(self.dataset, pick, self.members, self.sizes)[0]}
