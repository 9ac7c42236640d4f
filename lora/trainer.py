"""The training loop: phases, accumulation, EMA, checkpoints, validation, resume.

Everything random in a step follows from the seed, the phase and the step, and the states of the global generators are
in the checkpoint, so a run that was interrupted continues on a CPU bit by bit as if it had not been.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..generation.alone import alone
from ..generation.errors import BadInput
from ..generation.outputs import check_writable
from ..pipelines.errors import first_line
from ..pipelines.files.run_folder import RESULTS, SETTINGS
from .checkpoints.begun_from import kept
from .checkpoints.checkpoint import Checkpoint, CheckpointError, CheckpointFolder
from .checkpoints.resuming import changed, check_inputs, check_steps
from .checkpoints.written import Tensors, remedy, save_tensors, save_text
from .config import ConfigError, as_yaml, differences, load
from .distributed.fsdp import check_plugin, plugin_of
from .distributed.launched import check_accelerator, check_environment
from .distributed.processes import WAIT, ProcessLost
from .distributed.step_clips import step_clips_differences
from .footprint.memory import out_of_memory
from .logs.tracking import Tracker, choose_tracker
from .phase_checks import check_compiler, check_names, check_outline, check_phase, check_some_compile
from .phase_run import Diverged, PhaseRun
from .recipes.base import Phase, Recipe
from .run_context import RunContext
from .settings import RunSettings
from .stopping import Stopped, StopRequested

__all__ = ["Diverged", "Stopped", "Trainer", "make_accelerator"]

logger = logging.getLogger(__name__)

_WRITES = "while the result was written"

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: RunSettings) -> Accelerator:
    """The accelerator of a run, from the settings and from what `accelerate launch` says.

    Raises:
        ConfigError: a precision that the device cannot do, or that another run in this process has fixed otherwise; or
            FSDP 1, its activation checkpointing, DeepSpeed, or another way to use several devices that this trainer
            does not know.
    """
    check_environment(os.environ)
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
    except ConfigError:  # a tracker that is not installed
        raise
    except ValueError as error:
        raise ConfigError(f"accelerate refuses the settings: {error}") from error
    plugin = plugin_of(accelerator)
    try:
        check_accelerator(accelerator, config.sparse)
        if loop.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise ConfigError(
                "loop.mixed_precision is fp16, and the run is on the CPU, where that would be float32: set it to no or "
                "bf16, or train on a GPU."
            )
        if plugin is not None:
            check_plugin(plugin, loop.mixed_precision)
    except ConfigError:
        AcceleratorState._reset_state()  # else the next run in this process has it too, whatever it asks for
        raise
    if plugin is not None:
        # Else each process keeps the gradients of all weights whole until the last micro-batch of a step.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    return accelerator


@dataclass
class _Start:
    """Where a run takes up."""

    phase: str | None = None
    checkpoint: Checkpoint | None = None
    settings: RunSettings | None = None
    trained: Tensors = field(default_factory=dict)
    total_steps: int = 0

    @property
    def done(self) -> int:
        """Steps over all phases, those of the checkpoint's own included."""
        return self.total_steps + (self.checkpoint.step if self.checkpoint is not None else 0)


class Trainer:
    """Runs a recipe.

    Args:
        recipe: what to train.
        accelerator: of `make_accelerator`.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator, self.config = recipe, accelerator, recipe.config
        self.process = recipe.process
        self.out = Path(self.config.out)
        loop = self.config.loop
        self.checkpoints = CheckpointFolder(self.out / "checkpoints", loop.keep_last, loop.keep_adapters == "all")

    def run(self, resume: str | None = None) -> dict[str, Any]:
        """Train, or continue, and write the result.

        Args:
            resume: None, "latest", "auto" (latest, or from the start without any), or the folder of a checkpoint.

        Returns:
            What `recipe.finish` says; empty in processes other than the main one.

        Raises:
            ConfigError: what `recipe.prepare` refuses; or nothing can be written to `out`, or another run works in it.
            CheckpointError: nothing to resume from, other settings or data than then, or a last checkpoint that cannot
                be written.
            Stopped: on SIGINT, SIGTERM, SIGHUP or SIGUSR1; where training had begun, after a checkpoint.
            Diverged: the loss or a weight is no number any more.
            OutOfMemory: of a GPU; the message says what takes less.
            OSError: the result cannot be written. ProcessLost: another process of the run has ended.
        """
        self.tracker: Tracker | None = None
        self._taken = False
        self._changed: list[str] = []
        self._resume, self._doing, self._encodes = resume, "before training began", False
        with self.process.stop.listening(), contextlib.ExitStack() as self._while_it_runs:
            try:
                return self._run(resume)
            except StopRequested:
                if self.tracker is not None:
                    self.tracker.close()
                raise Stopped(f"stopped {self._doing}; {self._how_to_go_on()}") from None
            except torch.cuda.OutOfMemoryError as error:
                writes = self._doing == _WRITES
                measures = writes and self.recipe.measures_result
                go_on = self._how_to_go_on()
                raise out_of_memory(self.config, self._doing, go_on, trains=not writes, measures=measures) from error
            except (Stopped, Diverged):
                if self.tracker is not None:
                    self.tracker.end()
                raise
            except RuntimeError as error:
                if not self.process.is_lost(error):
                    raise
                raise ProcessLost(
                    f"another process of the run has ended, and its own output says why (here: {first_line(error)}); "
                    f"{self._how_to_go_on()}"
                ) from error
            finally:
                self.process.progress.close()

    def _run(self, resume: str | None) -> dict[str, Any]:
        with self.process.stop.at_once():
            phases = list(self.recipe.phases())
            check_names(phases)
            trained = [phase for phase in phases if phase.settings.steps]
            compiles, device, sharded = self.config.loop.compile, self.process.device, self.process.sharded
            for phase in trained:  # before long work, and before a checkpoint with its state is read
                check_phase(phase, device, sharded)
            if compiles:
                check_compiler(device, sharded)
            self._in_main(self._look_at_folder)
            start = self._start(resume, phases)
            if start.checkpoint is not None:
                self.recipe.began_with = start.checkpoint.state.get("inputs", {})
                self.recipe.continues = start.settings
                self.recipe.checkpoint = self.checkpoints.current
            self.recipe.prepare()
            for phase in trained:
                check_outline(phase)
            if compiles:
                check_some_compile(trained)
            inputs = self.recipe.inputs()
            if start.checkpoint is not None:
                has = kept(self.checkpoints.current, self.out)
                check_inputs(start.checkpoint.state.get("inputs", {}), inputs, has)
            self._in_main(self._begin_folder)
            if self.process.is_main and start.checkpoint is None:
                self.recipe.show_data(self.out)
            again = start.checkpoint is not None and start.checkpoint.validation_due
            self.tracker = Tracker(self.accelerator, self.config, self.process.progress, start.done, again)
            self._say_where_it_runs()
            for change in self._changed:
                self.tracker.say(change)
        context = RunContext(self.config, self.accelerator, self.process, self.checkpoints, self.tracker, inputs)
        results = self._phases(context, phases, start)
        self._doing = _WRITES
        with self.process.stop.at_once():
            result = self._finished(results) if self.process.is_main else {}
            self.process.wait()
        self.tracker.end()
        return result

    def _in_main(self, work: Callable[[], None]) -> None:
        """Do something in the main process, and end all of them where it refuses."""
        refused: Exception | None = None
        if self.process.is_main:
            try:
                work()
            except (ConfigError, OSError) as error:
                refused = error
        if self.process.any(refused is not None):
            raise refused or ConfigError(f"out: {self.out} cannot be used; the first process says why.")

    def _look_at_folder(self) -> None:
        """Refuse an `out` that nothing can be written to, before models and clips take their time."""
        if self.out.is_dir():
            self._take_folder()  # first: what an interrupted write left takes room
        try:
            check_writable("out", self.out / SETTINGS, value=self.out)
        except BadInput as error:
            if self.checkpoints.saved() and isinstance(cause := error.__cause__, OSError):
                told = f"{self.out} cannot be written to ({cause.strerror})."
                raise OSError(f"{told} {remedy(cause)}, and continue with --resume latest.") from cause
            raise ConfigError(str(error)) from error

    def _take_folder(self) -> None:
        """See that no other run works in `out`, and that none will while this one lasts.

        Raises:
            ConfigError: another one does.
        """
        try:
            self._while_it_runs.enter_context(alone(self.out, "trains", "run"))
        except BadInput as error:
            raise ConfigError(str(error)) from error
        self._taken = True
        # Before anything looks for checkpoints: the only one may be what an interrupted write was replacing.
        self.checkpoints.clean()

    def _begin_folder(self) -> None:
        if not self._taken:
            self._take_folder()
            if self.checkpoints.saved() or self.checkpoints.damaged():
                raise ConfigError(
                    f"out: another run was in {self.out} meanwhile: continue that one, or choose another."
                )
        try:
            save_text(as_yaml(self.config), self.out / SETTINGS)
            self.recipe.keep_inputs()
        except OSError as error:
            raise OSError(f"{error} {remedy(error)}, and {self.checkpoints.how_to_resume()}.") from error

    def _finished(self, trained: Tensors) -> dict[str, Any]:
        try:
            return self.recipe.finish(trained)
        except OSError as error:
            raise OSError(f"{error} {remedy(error)}, and {self.checkpoints.how_to_resume()}.") from error

    def _phases(self, context: RunContext, phases: list[Phase], start: _Start) -> Tensors:
        """Run the phases that are left; their results together."""
        trained, total = start.trained, start.total_steps
        names = [phase.name for phase in phases]
        first = names.index(start.phase) if start.phase else 0
        for number, phase in enumerate(phases):
            if number < first:
                continue
            if not phase.settings.steps:
                self.tracker.say(f"phase {phase.name}: skipped, it has 0 steps.")
                continue
            self._doing, self._encodes = f"while the phase {phase.name} was prepared", True
            with self.process.stop.at_once():
                run = PhaseRun(context, phase, trained, total)
                run.begin(start.checkpoint if number == first else None)
                start.checkpoint = None  # as large as weights and optimiser together
            self._encodes, self._doing = False, f"while the phase {phase.name} was trained"
            # Results of phases are for those that follow, and at last for the main process, which writes them.
            needed = self.process.is_main or any(later.settings.steps for later in phases[number + 1 :])
            trained = trained | run.train(needed) if needed else run.train(needed)
            total = run.state.total_steps
            self._keep(phase.name, trained)
            phase.close()
            del run
            self.accelerator.free_memory()
        return trained

    def _keep(self, phase: str, trained: Tensors) -> None:
        """Write the result of the phases so far. The checkpoint has it too, so a full disk is no reason to end here."""
        if not self.process.is_main:
            return
        try:
            save_tensors(trained, self.out / "phases" / f"{phase}.safetensors")
        except OSError as error:
            logger.error("%s The run goes on.", error)

    def _start(self, resume: str | None, phases: list[Phase]) -> _Start:
        chosen = self.process.decided(lambda: self._chosen(resume), CheckpointError)
        if resume == "auto":
            self._resume = "latest" if chosen else None
        if chosen is None:
            return _Start()
        path = self.checkpoints.current = Path(chosen)
        if self.process.any(not path.is_dir()):
            raise CheckpointError(
                f"{path} is not there for all processes: `out` must be one folder that all of them see, on a disk that "
                "their machines share."
            )
        try:
            then = load(type(self.config), path / "config.yaml")
        except ConfigError as error:
            raise CheckpointError(f"the settings in {path} cannot be read by this version: {error}") from error
        different = differences(then, self.config)
        if different:
            raise CheckpointError(
                f"{path} was written with other settings, so it cannot be continued:\n  " + "\n  ".join(different)
            )
        self._changed = changed(then, self.config)
        checkpoint = self.checkpoints.load(path)
        over = check_steps(path, checkpoint, phases, self.checkpoints, then, self.config)
        different = step_clips_differences(
            then, self.config, len(checkpoint.random), self.process.count, [phase.settings for phase in over]
        )
        if different:
            raise CheckpointError(
                f"{path} was written with other clips a step, so it cannot be continued:\n  " + "\n  ".join(different)
            )
        return _Start(checkpoint.phase, checkpoint, then, checkpoint.trained, checkpoint.total_steps - checkpoint.step)

    def _chosen(self, resume: str | None) -> str | None:
        """The folder of the checkpoint to go on from; None for a new run.

        Raises:
            CheckpointError: there is none, or a new run would be in the folder of another one.
        """
        saved = self.checkpoints.saved() or self.checkpoints.damaged()
        if resume == "auto":
            resume = "latest" if saved else None
        if resume is not None:
            return str(self.checkpoints.find(resume))
        if saved:
            raise CheckpointError(
                f"{self.out} holds a run already (its last checkpoint is {saved[-1].name}): continue it with "
                "--resume latest, or choose another `out`."
            )
        results = [name for name in RESULTS if (self.out / name).exists()]
        if results:
            raise CheckpointError(
                f"{self.out} holds the result of a run already ({', '.join(f'{name}/' for name in results)}), "
                "without a checkpoint to continue it from: choose another `out`, or move that away."
            )
        return None

    def _how_to_go_on(self) -> str:
        current, cache = self.checkpoints.current, self.recipe.encodings if self._encodes else None
        kept = f"what was encoded is kept in {cache}, and " if cache else ""
        if current is None and self._resume:  # before it was looked for
            return f"start again with --resume {shlex.quote(self._resume)}."
        where = "nothing was trained yet" if current is None else f"the run stands at {current.name}"
        return f"{kept}{where}: {self.checkpoints.how_to_resume()}."

    def _say_where_it_runs(self) -> None:
        count, device = self.process.count, self.process.device
        name = f"{device} ({_gpu_name()})" if device.type == "cuda" else str(device)
        self.tracker.say(
            f"{count} process{'es' if count > 1 else ''} on {name}, mixed_precision {self.config.loop.mixed_precision}."
        )
        # What accelerate sets where it was told of several processes, but starts one.
        launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
        if count == 1 and launched and "RANK" not in os.environ:
            logger.warning(
                "accelerate launch was told of several processes, but started one: it starts one for each GPU. On a "
                "CPU, add --multi_gpu to it and set loop.device to cpu."
            )


def _gpu_name() -> str:
    return torch.cuda.get_device_name()
