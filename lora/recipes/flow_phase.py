"""The phase that recipes share that train a transformer by flow matching: what is drawn for the loss, validation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..backbones.base import SampleRequest, Text
from ..distributed.fsdp import DTYPES
from ..distributed.generators import Generators
from ..logs.pictures import strips, write_picture, write_video, written_to
from ..settings import PhaseSettings
from .base import Batch, Clips, Phase
from .encoded_clips import EncodedClipsRecipe


class FlowPhase(Phase):
    """A phase that trains a transformer by flow matching.

    Args:
        name, settings: as those of `Phase`.
        recipe: whose.
        caption_dropout: share of the clips whose caption is left out.
        unconditional: what stands in its place.
    """

    error_is_loss: bool = True
    """What `flow_loss` calls "error", which is measured, is the loss itself: the log of training has it once."""

    def __init__(
        self,
        name: str,
        settings: PhaseSettings,
        recipe: EncodedClipsRecipe,
        caption_dropout: float,
        unconditional: str = "",
    ) -> None:
        super().__init__(name, settings)
        self.recipe, self.caption_dropout, self.unconditional = recipe, caption_dropout, unconditional

    @abstractmethod
    def levels(self, rng: Generators, latents: torch.Tensor) -> torch.Tensor:
        """Noise levels `[B]`, one for each of the clips `[B, C, T, H, W]`."""

    @abstractmethod
    def flow_loss(
        self, model: nn.Module, batch: Batch, noise: torch.Tensor, sigma: torch.Tensor, texts: Sequence[Text]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch whose noise, levels and texts are drawn, and further numbers for the log.

        Args:
            model, batch: as those of `Phase.loss`, the batch complete, and "dropped" `[B]`: whose caption was left out.
            noise: `[B, C, T, H, W]`.
            sigma: `[B]`, as the model can be told them.
            texts: of each clip; that of nothing where its caption was left out.
        """

    def clips(self) -> Clips:
        return self.recipe.ready(self.recipe.flowing)

    def loss(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, values = self._drawn(model, self.recipe.flowing.complete(batch), rng)
        return loss, {name: value for name, value in values.items() if name != "error" or not self.error_is_loss}

    def nothing(self) -> Text:
        """The text that stands for no caption."""
        return self.recipe.flowing.texts([self.unconditional])[0]

    def _drawn(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        noise = rng.normal(*batch["latents"].shape[1:])
        sigma = self.told_levels(rng, batch["latents"])
        dropped = rng.uniform() < self.caption_dropout
        nothing = self.nothing()
        texts = [nothing if drop else text for drop, text in zip(dropped.tolist(), batch["texts"], strict=True)]
        return self.flow_loss(model, {**batch, "dropped": dropped}, noise, sigma, texts)

    def told_levels(self, rng: Generators, latents: torch.Tensor) -> torch.Tensor:
        """Noise levels `[B]` as the model can be told them; the noise is that of these, not the other way round."""
        return self.recipe.backbone.told(self.levels(rng, latents), DTYPES[self.recipe.config.loop.mixed_precision])

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        def measure(batch: Batch, rng: Generators) -> dict[str, torch.Tensor]:
            return self._drawn(model, batch, rng)[1]

        recipe = self.recipe
        values = recipe.measured(recipe.flowing).mean(measure, self.settings.batch_size, recipe.process)
        if recipe.validation.prompts:
            self._sample(model, folder, step)
        return values

    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        """A video, see `PretrainedModel.sample`."""
        return self.recipe.backbone.sample(transformer, texts, request)

    def _sample(self, transformer: nn.Module, folder: Path, step: int) -> None:
        """Make videos from the prompts, each process a share; for image to video, from the first frames of the measured
        clips, in turn."""
        recipe, settings = self.recipe, self.recipe.validation
        texts = recipe.sampled_texts(recipe.flowing)
        pictures = recipe.measured(recipe.flowing).first_frames
        last = recipe.config.data.sizes[-1]

        def video(number: int) -> torch.Tensor:
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
                after_step=recipe.process.check_own_stop,
            )
            return self.sample(transformer, (texts[number], texts[-1]), request)

        with recipe.backbone.one_sampler():
            videos = recipe.process.shared(len(texts) - 1, video, "validation videos")
        if not recipe.process.is_main:
            return
        with written_to(folder):
            for number, made in enumerate(videos):
                if made.shape[1] > 1:
                    write_video(made, folder / f"{step:08d}_{number}.mp4", recipe.shown_rate)
            write_picture(strips(videos), folder / f"{step:08d}.png")


def train_only(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Let the parameters of the chosen names be trained, in float32 whatever the others are, and freeze the rest."""
    for name, parameter in model.named_parameters():
        trained = chosen(name)
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
