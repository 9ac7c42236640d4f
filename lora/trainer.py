"""The training loop: phases, accumulation, EMA, checkpoints, validation, resume.

Everything random in a step follows from the seed, the phase and the step, and the states of the global generators are
in the checkpoint, so a run that was interrupted continues on a CPU bit by bit as if it had not been.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .checkpoint import Checkpoint, CheckpointError, CheckpointFolder, Tensors, save_tensors, save_text
from .config import ConfigError, as_yaml, differences, load
from .fsdp import check_plugin, plugin_of
from .phase_run import Diverged, PhaseRun, Stopped
from .tracking import Tracker, choose_tracker

__all__ = ["Diverged", "Stopped", "Trainer", "make_accelerator"]

logger = logging.getLogger(__name__)

WAIT = timedelta(hours=12)
"""How long processes wait for one another: while one encodes clips or writes results, the others may wait for hours."""

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .recipes.base import Phase, Recipe
    from .settings import RunSettings


def make_accelerator(config: RunSettings) -> Accelerator:
    """The accelerator of a run, from the settings and from what `accelerate launch` says.

    Raises:
        ConfigError: a precision that the device cannot do, or that another run in this process has fixed otherwise; or
            FSDP 1.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

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
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
        )
    except ValueError as error:
        raise ConfigError(f"accelerate refuses the settings: {error}") from error
    plugin = plugin_of(accelerator)
    if plugin is not None:
        check_plugin(plugin, loop.mixed_precision)
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
            Diverged: the loss or a weight is no number any more.
        """
        phases = list(self.recipe.phases())
        if self.accelerator.is_main_process:
            # Before anything looks for checkpoints: the only one may be what an interrupted write was replacing.
            self.checkpoints.clean()
        self.accelerator.wait_for_everyone()
        start = self._start(resume, phases)
        self.recipe.prepare()
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            save_text(as_yaml(self.config), self.out / "config.yaml")
        self.accelerator.wait_for_everyone()
        self.tracker = Tracker(self.accelerator, self.config)
        try:
            trained = self._phases(phases, start)
        except (Stopped, Diverged):
            self.tracker.close()
            raise
        result = self.recipe.finish(trained) if self.accelerator.is_main_process else {}
        self.accelerator.wait_for_everyone()
        self.tracker.close()
        return result

    def _phases(self, phases: list[Phase], start: _Start) -> Tensors:
        """Run the phases that are left; their results together."""
        trained, total = start.trained, start.total_steps
        names = [phase.name for phase in phases]
        first = names.index(start.phase) if start.phase else 0
        with self._signals():
            for number, phase in enumerate(phases):
                if number < first:
                    continue
                if not phase.settings.steps:
                    self.tracker.say(f"phase {phase.name}: skipped, it has 0 steps.")
                    continue
                run = PhaseRun(self, phase, trained, total)
                run.begin(start.checkpoint if number == first else None)
                start.checkpoint = None  # as large as weights and optimiser together
                trained = trained | run.train()
                total = run.total_steps
                self._keep(phase.name, trained)
                phase.close()
                if run.stopped and phase is not phases[-1]:
                    raise Stopped(f"stopped after phase {phase.name}; continue with --resume latest.")
                del run
                self.accelerator.free_memory()
        return trained

    def _keep(self, phase: str, trained: Tensors) -> None:
        """Write the result of the phases so far. The checkpoint has it too, so a full disk is no reason to end here."""
        if not self.accelerator.is_main_process:
            return
        file = self.out / "phases" / f"{phase}.safetensors"
        try:
            save_tensors(trained, file)
        except (OSError, SafetensorError) as error:
            logger.error("%s could not be written: %s. The run goes on.", file, error)

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
        steps = {phase.name: phase.settings.steps for phase in phases}
        if checkpoint.phase not in steps:
            raise CheckpointError(f"{path} is in the phase {checkpoint.phase}, which this recipe does not have.")
        if not steps[checkpoint.phase]:
            raise CheckpointError(f"{path} is in the phase {checkpoint.phase}, whose steps are 0 now: set 1 or more.")
        return _Start(checkpoint.phase, checkpoint, checkpoint.trained, checkpoint.total_steps - checkpoint.step)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the step first."""

        def ask(number: int, _: Any) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True
            self.tracker.say(f"{signal.Signals(number).name}: a checkpoint is written, then the run ends.")

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
