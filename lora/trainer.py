"""The training loop: phases, accumulation, averaged weights, checkpoints, validation, resume.

Everything random in a step follows from the seed, the phase and the step, and the states of the global generators are
in the checkpoint, so a run that was interrupted continues on a CPU bit by bit as if it had not been.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    Tensors,
    save_tensors,
)
from .config import ConfigError, as_yaml, differences, load
from .phase_run import Diverged, PhaseRun, Stopped
from .record import Record, choose_tracker

__all__ = ["Diverged", "Stopped", "Trainer", "make_accelerator"]

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .recipes.base import Phase, Recipe
    from .settings import RunSettings


def make_accelerator(config: RunSettings) -> Accelerator:
    """The accelerator of a run, from the settings and from what `accelerate launch` says.

    Raises:
        ConfigError: a precision that the device cannot do, or that another run in this process has fixed otherwise.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    loop = config.loop
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != loop.mixed_precision:
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=loop.mixed_precision,
            log_with=choose_tracker(loop.tracker),
            # A folder of its own: tensorboard makes one with the recipe's name in it.
            project_config=ProjectConfiguration(config.out, logging_dir=str(Path(config.out) / "tracker")),
            cpu=loop.device == "cpu",
        )
    except ValueError as error:
        raise ConfigError(f"accelerate refuses the settings: {error}") from error
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise ConfigError("FSDP 1 is not supported: set fsdp_version: 2 in the configuration of accelerate.")
    return accelerator


@dataclass
class _Start:
    """Where a run takes up."""

    phase: str | None = None
    checkpoint: Checkpoint | None = None
    trained: Tensors = field(default_factory=dict)
    total_steps: int = 0


class Trainer:
    """Runs a recipe.

    Args:
        recipe: what to train.
        accelerator: of `make_accelerator`.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator, self.config = recipe, accelerator, recipe.config
        self.out = Path(self.config.out)
        self.checkpoints = CheckpointFolder(self.out / "checkpoints", self.config.loop.keep_last)
        self.stop = False

    def run(self, resume: str | None = None) -> dict[str, Any]:
        """Train, or continue, and write the result.

        Args:
            resume: None, "latest", "auto" (latest, or from the start without any), or the folder of a checkpoint.

        Returns:
            What `recipe.finish` says; empty in processes other than the main one.

        Raises:
            ConfigError: what `recipe.prepare` refuses.
            CheckpointError: nothing to resume from, other settings than then, or a last checkpoint that cannot be
                written.
            Stopped: on SIGINT or SIGTERM, after a checkpoint.
            Diverged: the loss is no number any more.
        """
        phases = list(self.recipe.phases())
        start = self._start(resume, phases)
        self.recipe.prepare()
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            self.checkpoints.clean()
            (self.out / "config.yaml").write_text(as_yaml(self.config), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        self.record = Record(self.accelerator, self.config)
        trained, total = start.trained, start.total_steps
        names = [phase.name for phase in phases]
        first = names.index(start.phase) if start.phase else 0
        with self._signals():
            for number, phase in enumerate(phases):
                if number < first:
                    continue
                if not phase.settings.steps:
                    self.record.say(f"phase {phase.name}: skipped, it has 0 steps.")
                    continue
                run = PhaseRun(self, phase, trained, total)
                trained = trained | run.train(start.checkpoint if number == first else None)
                total = run.total_steps
                if self.accelerator.is_main_process:
                    save_tensors(trained, self.out / "phases" / f"{phase.name}.safetensors")
                phase.close()
                if run.stopped and phase is not phases[-1]:
                    raise Stopped(f"stopped after phase {phase.name}; continue with --resume latest.")
                del run
                self.accelerator.free_memory()
        result = self.recipe.finish(trained) if self.accelerator.is_main_process else {}
        self.accelerator.wait_for_everyone()
        self.record.close()
        return result

    def _start(self, resume: str | None, phases: list[Phase]) -> _Start:
        if resume == "auto":
            resume = "latest" if self.checkpoints.saved() else None
        if resume is None:
            saved = self.checkpoints.saved()
            if saved:
                raise CheckpointError(
                    f"{self.out} holds a run already (its last checkpoint is {saved[-1].name}): continue it with "
                    "--resume latest, or choose another `out`."
                )
            return _Start()
        path = self.checkpoints.find(resume)
        try:
            then = load(type(self.config), path / "config.yaml")
        except ConfigError as error:
            raise CheckpointError(f"the settings in {path} cannot be read by this version: {error}") from error
        different = differences(then, self.config)
        if different:
            raise CheckpointError(
                f"{path} was written with other settings, so it cannot be continued:\n  " + "\n  ".join(different)
            )
        checkpoint = self.checkpoints.load(path)
        if checkpoint.phase not in [phase.name for phase in phases]:
            raise CheckpointError(f"{path} is in the phase {checkpoint.phase}, which this recipe does not have.")
        return _Start(checkpoint.phase, checkpoint, checkpoint.trained, checkpoint.total_steps - checkpoint.step)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the step first."""

        def ask(number: int, _: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            self.record.say(f"{signal.Signals(number).name}: a checkpoint is written, then the run ends.")

        previous = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, ask)
        except ValueError:
            pass  # not in the main thread, where nothing can be caught
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
