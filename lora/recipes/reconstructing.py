"""What the recipes share that train a decoder of pixels on clips of videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...autoencoders.tiny import compression_of, frames_of
from ..config import ConfigError, Settings, setting
from ..data.account import say_what_the_data_are
from ..data.dataset import ClipDataset, open_dataset, sturdy_pixels
from ..data.held_out import HeldOut, hold_out
from ..data.identities import dataset_identity
from ..data.sampler import Pick, without
from ..data.sheet import write_sheet
from ..distributed.generators import Generators
from ..logs.pictures import strips, write_picture, written_to
from ..reconstruction import LossSettings, Reconstruction, Wanted, quality
from ..settings import PhaseSettings, RunSettings, SizeSettings, nothing_trained
from .base import Batch, Clips, Phase, Recipe, check_taken

HELD_AS = "the size with which validation.clips were held out"
"""Among the `inputs` of a run: which files have such a clip depends on it, and `validation.size` may change."""


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
        size: of these clips; None for the last of `data.sizes`. Files that a run has held out stay so with another one.
    """

    clips: int | None = setting(None, low=1)
    size: SizeSettings | None = field(default=None, metadata={"free": True})


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
    continues: ReconstructionSettings | None = None
    measures_result = True

    def prepare(self) -> None:
        config = self.config
        self.dataset = open_dataset(config.data, config.seed, True, need_captions=False, process=self.process)
        self.held_out = self._held_out()
        if self.process.is_main:
            for sizes in dict.fromkeys(p.sizes or config.data.sizes for p in config.phases if p.steps):
                say_what_the_data_are(self.dataset, sizes, self.held_out, self.process.progress.say)
        self.build()  # the shape must be one that exists
        if config.loss.perceptual:
            from ..reconstruction import perceptual_network

            perceptual_network()

    def _held_out(self) -> HeldOut:
        """The clips to measure with, of the files that the run began to hold out: they depend on the size.

        Raises:
            ConfigError: there are not enough clips; or a file of theirs gives none of the size of now.
        """
        config, size, began = self.config, _measured_size(self.config), self._size_of_held_out
        held = hold_out(self.dataset, (began,), config.validation.clips, self.seed_of_held_out, usual=4, least=1)
        then = None if self.continues is None else _text(_measured_size(self.continues))
        if then not in (None, _text(size)):
            self.process.progress.say(
                f"validation.size is {_text(size)} from here on, and was {then}: what is measured compares with what "
                "was measured before only roughly."
            )
        if _text(size) == _text(began):
            return held
        members = self.dataset.members((size,))
        lost = [] if members is None else sorted({pick.index for pick in held.picks}.difference(members[0]))
        if lost:
            raise ConfigError(
                f"validation.size is {_text(size)}, and {len(lost)} of the {len(held.picks)} clips that this run holds "
                f"out have fewer frames: give {began.frames} frames or fewer."
            )
        shape = (size.frames, size.height, size.width)
        return replace(held, picks=tuple(replace(pick, size=shape) for pick in held.picks))

    @property
    def _size_of_held_out(self) -> SizeSettings:
        """The size with which this run began to hold clips out."""
        if self.continues is None or self.began_with is None:
            return _measured_size(self.config)
        began = self.began_with.get(HELD_AS)
        if began is None:  # from before the size could change
            return _measured_size(self.continues)
        frames, height, width = map(int, began.split("x"))
        return SizeSettings(frames, height, width)

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
        held = {**self.held_out_input(), HELD_AS: _text(self._size_of_held_out)}
        return {f"{data.source} ({data.kind})": identity, **held}

    def build(self) -> Any:
        """What is trained, as training starts, for `Reconstruction`."""
        raise NotImplementedError

    @property
    def wanted(self) -> Wanted | None:
        """What should be made of a clip; None for the clip itself."""
        return None

    def phases(self) -> list[Phase]:
        return [ReconstructionTraining(self, settings) for settings in self.config.phases]

    def validation_clips(self) -> Iterator[torch.Tensor]:
        """The clips that are measured, each `[1, 3, T, H, W]`, where the model is."""
        for pick in self.held_out.picks:
            yield self.dataset.pixels(pick)[None].to(self.process.device)

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
        return quality((model(clip).sample, clip) for clip in self.validation_clips())


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
            return model(clip.to(process.device), reconstruct=True).float().cpu(), clip

        pairs = process.shared(len(recipe.held_out.picks), pair, "validation clips")
        if not process.is_main:
            return {}
        with written_to(folder):
            write_picture(strips([x[0] for made, clip in pairs for x in (clip, made)]), folder / f"{step:08d}.png")
        return quality(pairs, process.device)


class Pixels:
    """The clips of a dataset as they are, without those held out."""

    def __init__(self, dataset: ClipDataset, sizes: tuple[SizeSettings, ...], held_out: HeldOut) -> None:
        self.dataset, self.sizes = dataset, sizes
        self.members = without(dataset.members(sizes), held_out.clips)
        self.decodes = True

    def load(self, pick: Pick) -> Batch:
        return {"pixels": sturdy_pixels(self.dataset, pick, self.members, self.sizes)[0]}


def _measured_size(config: ReconstructionSettings) -> SizeSettings:
    return config.validation.size or config.data.sizes[-1]


def _text(size: SizeSettings) -> str:
    return f"{size.frames}x{size.height}x{size.width}"
