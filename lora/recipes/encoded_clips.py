"""What recipes share that train a model on encoded clips: opening data and caches, encoding, the clips measured."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...generation.models.files import folder_reader
from ...pipelines.deep_compression.adapter_folder import DEFAULTS_FILE
from ..backbones.base import Encoder, PretrainedModel, Text
from ..checkpoints.written import save_text
from ..config import ConfigError
from ..data.account import say_what_the_data_are
from ..data.cache import Fingerprints, TensorCache
from ..data.dataset import open_dataset
from ..data.held_out import hold_out
from ..data.identities import dataset_identity
from ..data.latents import Latents, say_what_is_cut
from ..data.sheet import write_sheet
from ..settings import ValidationSettings
from .base import Recipe
from .measured_clips import MeasuredClips


class EncodedClipsRecipe(Recipe):
    """A recipe whose clips and captions are encoded, once where there is a cache.

    Attributes:
        backbone: the model.
        flowing: the clips that flow matching trains on.
    """

    backbone: PretrainedModel
    flowing: Latents

    def made_for(self) -> dict[str, Any]:
        """The size of the clips and the guidance of the validation, which are the defaults of what was trained.

        Of several sizes it is the last one, of images and videos the last one of videos.
        """
        sizes = self.config.data.sizes
        size = ([size for size in sizes if size.frames > 1] or list(sizes))[-1]
        return {
            "frames": size.frames,
            "height": size.height,
            "width": size.width,
            "guidance_scale": self.validation.guidance_scale,
        }

    def write_defaults(self, folder: Path, highest: float = math.inf) -> None:
        """Write the defaults of a pipeline that makes in each step what its base does, so with the steps and the
        guidance that the base states.

        Args:
            folder: of the pipeline.
            highest: guidance scale that it can do.

        Raises:
            NotWritten: it cannot be written.
        """
        stated = folder_reader(Path(self.backbone.base))(DEFAULTS_FILE) or {}
        defaults = self.made_for() | {name: stated[name] for name in ("steps", "guidance_scale") if name in stated}
        defaults["guidance_scale"] = min(defaults["guidance_scale"], highest)
        save_text(json.dumps(defaults, indent=2) + "\n", folder / DEFAULTS_FILE)

    def open_data(self) -> None:
        """Check the sizes, open data, cache and text encoder, and choose the clips that are measured.

        Raises:
            ConfigError: sizes or a negative prompt that the model cannot take, or data that cannot be read.
        """
        config = self.config
        for number, size in enumerate(config.data.sizes):
            refusal = self.backbone.check_size(size.frames, size.height, size.width)
            if refusal:
                raise ConfigError(f"data.sizes.{number}: {refusal}")
            if self.backbone.image and size.frames == 1:
                raise ConfigError(
                    f"data.sizes.{number}: a clip of 1 frame has nothing behind its first frame, from which "
                    f"{self.backbone.base} starts: give more frames."
                )
        if self.backbone.image and self.validation.prompts and self.validation.clips == 0:
            raise ConfigError("validation.clips is 0, but videos from prompts need their first frames: set it to 1.")
        if self.validation.negative_prompt and not self.backbone.takes_negative_prompts:
            raise ConfigError(
                f"validation.negative_prompt is {self.validation.negative_prompt!r}, but {self.backbone.base} runs "
                "without one: it is distilled on guidance. Leave it out."
            )
        self.dataset = open_dataset(config.data, config.seed, process=self.process)
        half = None if config.data.cache_dtype == "float32" else config.data.cache_dtype
        self.cache = TensorCache(config.data.cache, half) if config.data.cache else None
        self.backbone.fingerprints = Fingerprints(self.cache)
        self.text_encoder = self.backbone.text_encoder()
        if self.process.is_main:
            say_what_is_cut(self.dataset.captions(), self.text_encoder)
        self.held_out = hold_out(self.dataset, config.data.sizes, self.validation.clips, self.seed_of_held_out)
        if self.backbone.image and self.validation.prompts and not self.held_out.picks:
            raise ConfigError(
                "there are too few clips for any to be measured where validation.clips says nothing, but videos from "
                "prompts need their first frames: set it to 1."
            )
        if self.process.is_main:
            say_what_the_data_are(
                self.dataset, config.data.sizes, self.held_out, self.process.progress.say, self.backbone.rate
            )
        self._measured: dict[Latents, MeasuredClips] = {}

    def show_data(self, folder: Path) -> None:
        data = self.config.data
        if file := write_sheet(self.dataset, data.sizes, self.held_out, data.contact_sheet, folder):
            self.process.progress.say(f"What some of the clips look like: {file}")

    def latents(self, encoder: Encoder, unconditional: str = "") -> Latents:
        """The clips as an encoder makes them, with the texts that the recipe asks for beside their captions."""
        prompts: tuple[str, ...] = (unconditional, self.validation.negative_prompt)
        if not self.text_encoder.pictured:
            prompts += self.validation.prompts
        data, held_out = self.config.data, self.held_out.clips
        return Latents(
            self.dataset, data.sizes, encoder, self.text_encoder, self.cache, held_out, prompts, data.workers
        )

    @abstractmethod
    def used(self) -> Iterable[Latents]:
        """What the phases that have steps train on; called after `prepare`."""

    @property
    def validation(self) -> ValidationSettings:
        """What is measured and made on the side."""
        return self.config.validation  # type: ignore[attr-defined]  # all of these recipes have it

    @property
    def shown_rate(self) -> float:
        """Frames a second of the videos that a validation makes."""
        return self.validation.fps or self.config.data.fps or self.backbone.rate or 16.0

    def encode(self) -> dict[str, Any]:
        data = self.config.data
        if data.cache is None:
            raise ConfigError("data.cache is missing: with --encode-only, say in which folder encodings are kept.")
        if self._endless():
            raise ConfigError("clips that are endless cannot be encoded beforehand: set data.clips.")
        self.prepare()
        used = list(self.used())
        for latents in used:
            self.ready(latents)
        clips = {index for latents in used for indices in latents.members.values() for index in indices}
        return {"cache": data.cache, "clips": len(clips), "captions": len(self.dataset.captions())}

    @property
    def encodings(self) -> str | None:
        return None if self._endless() else self.config.data.cache

    def _endless(self) -> bool:
        """Whether every clip is a new one, of which none is kept."""
        return self.config.data.kind == "demo" and self.config.data.clips is None

    def data_identity(self) -> dict[str, str]:
        """What the data are, by the setting that says where they lie; for `inputs`."""
        data = self.config.data
        identity = dataset_identity(self.dataset, data.sizes, process=self.process)
        return {f"{data.source} ({data.kind})": identity, **self.held_out_input()}

    def ready(self, latents: Latents) -> Latents:
        """Encode what the cache lacks and the clips that are measured; before a model takes the memory for training."""
        latents.fill(self.process)
        self.measured(latents)
        return latents

    def measured(self, latents: Latents) -> MeasuredClips:
        """The clips that are measured, encoded once."""
        if latents not in self._measured:
            made = MeasuredClips(self.dataset, self.held_out.picks, latents, self.backbone.image)
            self._measured[latents] = made
            if latents.pictured and self.validation.prompts:
                self.sampled_texts(latents)
                latents.release()
        return self._measured[latents]

    def sampled_texts(self, latents: Latents) -> list[Text]:
        """The texts of the prompts that videos are made from, and of the negative one behind them."""
        prompts, pictures = self.validation.prompts, None
        if latents.pictured:
            frames = self.measured(latents).first_frames
            pictures = [frames[number % len(frames)] for number in range(len(prompts))]
        return [*latents.texts(prompts, pictures), *latents.texts([self.validation.negative_prompt])]
