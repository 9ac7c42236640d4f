"""What a recipe is: settings, and phases that each train some parameters of a module with a loss."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ...pipelines.files.run_folder import taken
from ..backbones.folders import located
from ..checkpoints.checkpoint import CheckpointError
from ..config import ConfigError
from ..data.sampler import Pick
from ..distributed.generators import Generators
from ..distributed.processes import Process
from ..settings import PhaseSettings, RunSettings, SizeSettings

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
SEEDED = "the order of validation.clips"
"""Among the `inputs` of a run whose measured clips are chosen in an order of its seed; runs that began before there was
one keep theirs."""


class Clips(Protocol):
    """A dataset: which clips there are, and how one is made. It is copied to background processes.

    Attributes:
        sizes: of the clips.
        members: indices of the clips by number of the size; None for an endless set, whose indices are seeds.
        decodes: whether `load` decodes a file each time, which takes longer than reading what was encoded.
    """

    @property
    def sizes(self) -> Sequence[SizeSettings]: ...

    @property
    def members(self) -> Mapping[int, Sequence[int]] | None: ...

    @property
    def decodes(self) -> bool: ...

    def load(self, pick: Pick) -> Batch:
        """The parts of one clip; tensors of a batch are stacked, everything else is listed."""
        ...


class Phase(ABC):
    """One phase. The trainer calls `clips`, `setup`, then `loss` in each micro-step, `validate`, and `close`.

    Args:
        name: unique in the recipe.
        settings: steps, learning rate and so on.
    """

    whole_weights: str = ""
    """Why the weights of its module must be whole, which FSDP splits; empty where they need not be."""
    teacher: nn.Module | None = None
    """A second module that is not trained, made by `setup`; see `teachers`."""

    def __init__(self, name: str, settings: PhaseSettings) -> None:
        self.name, self.settings = name, settings

    @abstractmethod
    def setup(self, trained: Mapping[str, torch.Tensor]) -> nn.Module:
        """The module whose parameters with `requires_grad` are trained.

        Args:
            trained: results of the phases before, by parameter name; to be copied in. An interrupted run comes here
                with the same values, so a phase must depend on the ones before by these alone.
        """

    def outline(self) -> nn.Module | None:
        """What `setup` will give, with or without weights, to look into its layers after `Recipe.prepare` and before
        anything is encoded or trained; None where that is not known yet.
        """
        return None

    @abstractmethod
    def clips(self) -> Clips:
        """What is trained on; called before `setup`, so that what encodes it need not share the memory with the model.

        Raises:
            ConfigError: none of it can be read.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, rng: Generators) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a micro-batch, a mean over its clips, and further numbers for the log.

        Args:
            model: what `setup` gave, wrapped for several processes; call it, do not reach into it.
            batch: of `clips`, on the device.
            rng: the random numbers to use.
        """

    def teachers(self) -> Sequence[nn.Module]:
        """Modules that are not trained, which `setup` makes on the CPU; the trainer puts them where the one is that is,
        and spreads them over the processes where FSDP spreads that one.
        """
        return [] if self.teacher is None else [self.teacher]

    def learning_rate_scale(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied by."""
        return 1.0

    def clipped_with(self, name: str) -> str:
        """The part of the model with whose gradients that of a parameter is clipped: "" for the one that all is about.

        Parts that are trained against one another, each with a loss of its own, have a norm each.
        """
        return ""

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Numbers for the log, and files in `folder`. The model has the weights of its EMA and is in eval mode; it is
        what `setup` gave, without what lets processes train it together, so that each can call it by itself.

        It runs in every process, and `Process.shared` lets each do a part, or all of them where the model is sharded.
        Only the main one writes files, in the block `pictures.written_to`, whose names begin with the step in eight
        digits: they go to the tracker. What counts of the numbers is what the main process has.
        """
        return {}

    def write_adapter(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:  # noqa: B027 - not all have one
        """Write what was trained so far below the folder of a checkpoint, as a pipeline loads it.

        Args:
            folder: of the checkpoint.
            weights: results of the phases before and of this one so far (of its EMA where it has one), on the CPU.
        """

    def close(self) -> None:  # noqa: B027 - most phases have nothing to let go of
        """Let go of what only this phase needs."""


class Recipe(ABC):
    """A training recipe.

    Args:
        config: its settings.
        process: the one that it runs in.
    """

    Config: ClassVar[type[RunSettings]]
    began_with: Mapping[str, str] | None = None
    """The `inputs` of the run that is continued, from before `prepare`; None for a new run."""
    continues: RunSettings | None = None
    """The settings of the checkpoint that it is continued from, of the class `Config`; None for a new run."""
    checkpoint: Path | None = None
    """Where that checkpoint lies; None for a new run."""
    measures_result: ClassVar[bool] = False
    """Whether `finish` measures the clips of the validation."""

    def __init__(self, config: RunSettings, process: Process) -> None:
        self.config, self.process = config, process

    @abstractmethod
    def prepare(self) -> None:
        """Check what the settings name (models, folders) and load it. Nothing of the run is written before.

        Raises:
            ConfigError: it does not exist or does not fit together.
        """

    def inputs(self) -> dict[str, str]:
        """What the training depends on beside the settings, by the setting that says where it lies, such as a hash of a
        model's files; called after `prepare`. A run is continued only where they are equal.
        """
        return {}

    def pipeline_at(self, location: str, setting: str, *built_in: str) -> str:
        """`located` for a pipeline; which one of the folder of a run was taken is told.

        Raises:
            ConfigError: there is none.
        """
        place = located(location, setting, *built_in)
        if self.process.is_main and location not in built_in and (told := taken(location, Path(place))):
            logger.info("%s", told)
        return place

    @property
    def seed_of_held_out(self) -> int | None:
        """What the order follows from in which files are held out; see `hold_out`."""
        return self.config.seed if self.began_with is None or SEEDED in self.began_with else None

    def held_out_input(self) -> dict[str, str]:
        """Of `inputs`, in which order files are held out."""
        return {} if self.seed_of_held_out is None else {SEEDED: "1"}

    @property
    def encodings(self) -> str | None:
        """The folder in which the clips and captions that it encodes stay for the next run; None where none do."""
        return None

    @abstractmethod
    def phases(self) -> Sequence[Phase]:
        """The phases in order, those with 0 steps included; called before `prepare`, so they load nothing yet."""

    def show_data(self, folder: Path) -> None:  # noqa: B027 - not all have clips
        """Write what the clips look like into the folder of the run; called in the main process, after `prepare`."""

    def keep_inputs(self) -> None:  # noqa: B027 - most need nothing that may be gone later
        """Write into the folder of the run what a resume needs and what may be gone by then; called in the main
        process, after `prepare`.

        Raises:
            NotWritten: it cannot be read any more, or not be written.
        """

    def encode(self) -> dict[str, Any]:
        """Fill the caches that the run would fill, and nothing else; called in every process, instead of `prepare`.

        Returns:
            What to tell the user.

        Raises:
            ConfigError: this recipe keeps no encodings, or the settings have no cache for them.
            CheckpointError: the cache cannot be written.
        """
        raise ConfigError(f"the recipe {self.config.recipe} keeps no encodings: leave --encode-only out.")

    @abstractmethod
    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Write the result below `config.out`; called in the main process.

        Returns:
            What to tell the user: paths and numbers.
        """


def load_trained(module: nn.Module, trained: Mapping[str, torch.Tensor]) -> None:
    """Copy results of earlier phases into the parameters that have their names; others are left alone.

    Raises:
        CheckpointError: a result is of another shape than the parameter, or of one that the module does not have: what
            was trained would be lost without a word.
    """
    left = dict(trained)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in left:
                value = left.pop(name)
                if parameter.shape != value.shape:
                    raise CheckpointError(
                        f"{name} is {list(value.shape)} in the checkpoint and {list(parameter.shape)} in the model: "
                        "resume with the model it was trained with."
                    )
                parameter.copy_(value)
    check_taken(left, len(trained), type(module).__name__)


def check_taken(left: Collection[str], count: int, what: str) -> None:
    """Raise CheckpointError where trained weights have names that nothing takes.

    Args:
        left: these names.
        count: of all of them.
        what: what does not have them, for the message.
    """
    if left:
        raise CheckpointError(
            f"{len(left)} of {count} trained weights, such as {sorted(left)[0]}, have no place in the {what}: they "
            "were trained with another model, or with another version of this package. Resume with that one."
        )
