"""What the phases of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoints.checkpoint import CheckpointFolder
from .distributed.processes import Process
from .logs.tracking import Tracker
from .settings import RunSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class RunContext:
    """What the phases of a run share.

    Args:
        config: the settings.
        accelerator: of `make_accelerator`.
        process: this one.
        checkpoints: of the run.
        tracker: its log.
        inputs: what the data and the models of the run are, by setting; see `Recipe.inputs`.
    """

    config: RunSettings
    accelerator: Accelerator
    process: Process
    checkpoints: CheckpointFolder
    tracker: Tracker
    inputs: dict[str, str]

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return Path(self.config.out)
