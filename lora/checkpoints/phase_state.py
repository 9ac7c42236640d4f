"""The state of a phase in progress, into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ...pipelines.errors import few_of
from ..distributed.sharding import copy_whole, optimizer_state, whole
from ..ema import EMA
from ..logs.tracking import Means
from .checkpoint import Checkpoint, CheckpointError, set_random_state
from .written import Tensors

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer


@dataclass
class PhaseState:
    """What a phase is made of while it is trained.

    Args:
        phase: its name.
        accelerator: of the run.
        named: the parameters that it trains.
        optimizer: as accelerate wraps it.
        ema: of the parameters, or None.
        trained: result of the phases before, by parameter name.
        before: optimiser steps done before this phase.
        inputs: what the data and the models of the run are.
        step: optimiser steps done in it.
        seconds: training time of the phase, by the clock of the main process.
        validation_due: whether the validation after `step` was cut off.
        means: of the numbers of the steps behind the last line of the log.
        logged: `step` and `seconds` of that line.
    """

    phase: str
    accelerator: Accelerator
    named: Mapping[str, nn.Parameter]
    optimizer: AcceleratedOptimizer
    ema: EMA | None
    trained: Tensors
    before: int
    inputs: dict[str, str] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    validation_due: bool = False
    means: Means = field(default_factory=Means)
    logged: tuple[int, float] = (0, 0.0)

    @property
    def total_steps(self) -> int:
        return self.before + self.step

    def result(self, keep: bool = True) -> Tensors:
        """The weights of the phase, those of the EMA where it has one; every process must call this.

        Args:
            keep: False in a process that no one asks for them; it takes part in gathering what is sharded, and has an
                empty result: a copy of all weights for each process would fill the memory of a machine.
        """
        found = whole(self.named, keep) if self.ema is None else self.ema.whole(keep)
        return found if keep else {}

    def take(self, random: dict[str, Any]) -> Checkpoint:
        """The state as a checkpoint; every process must call this.

        In processes other than the main one it holds no tensors: they only take part in gathering what is sharded, so
        that the copies lie in the memory of the machine once.

        Args:
            random: the states of this process's random generators after `step`.
        """
        keep, scaler, ema = self.accelerator.is_main_process, self.accelerator.scaler, self.ema
        optimizer = self.optimizer.optimizer.state_dict()
        return Checkpoint(
            phase=self.phase,
            step=self.step,
            total_steps=self.total_steps,
            seconds=self.seconds,
            trained=self.trained,
            weights=whole(self.named, keep),
            ema=ema.whole(keep) if ema is not None else {},
            state={
                "optimizer": whole(optimizer, keep),
                "moments": _moments(optimizer),
                "ema_steps": ema.steps if ema is not None else 0,
                "scaler": scaler.state_dict() if scaler is not None else {},
                "validation_due": self.validation_due,
                "inputs": self.inputs,
                "logged": {"at": list(self.logged), **self.means.state(self.accelerator)},
            },
            random=_gathered(random, self.accelerator),
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Bring a phase that was just built to the state of a checkpoint.

        Raises:
            CheckpointError: it is of another model, of a version with another weight decay, or lacks moments.
        """
        if set(checkpoint.weights) != set(self.named):
            odd = sorted(set(checkpoint.weights) ^ set(self.named))
            raise CheckpointError(f"the checkpoint has other parameters than this model: {few_of(odd)}.")
        for what, tensors in ("", checkpoint.weights), ("the average of ", checkpoint.ema):
            for name in self.named if tensors else ():
                then = None if name not in tensors else list(tensors[name].shape)
                if then != (now := list(self.named[name].shape)):
                    found = "is not there" if then is None else f"has the shape {then}"
                    raise CheckpointError(f"{what}{name} {found} in the checkpoint, and {now} in this model.")
        if lacking := {"optimizer", "ema_steps"} - set(checkpoint.state):
            raise CheckpointError(f"the checkpoint lacks the state of {min(lacking)}: resume from an earlier one.")
        inner = self.optimizer.optimizer
        # Checkpoints of before have no number, and loss scaling may have passed over all steps.
        expected = checkpoint.state.get("moments", int(checkpoint.step > 0 and self.accelerator.scaler is None))
        if (there := _moments(checkpoint.state["optimizer"])) < expected:
            raise CheckpointError(
                f"the checkpoint has {there} moments of its optimiser, and {expected} or more were written, so the run "
                "would go on with others than it had: resume from an earlier one."
            )
        _check_groups(checkpoint.state["optimizer"]["param_groups"], inner.param_groups)
        for name, parameter in self.named.items():
            copy_whole(parameter, checkpoint.weights[name])
        if self.ema is not None:
            self.ema.restore(checkpoint.ema, checkpoint.state["ema_steps"])
        ordered = [p for group in inner.param_groups for p in group["params"]]
        inner.load_state_dict(optimizer_state(checkpoint.state["optimizer"], ordered))
        if self.accelerator.scaler is not None and checkpoint.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.step, self.seconds = checkpoint.step, checkpoint.seconds
        self.validation_due = checkpoint.validation_due
        logged = checkpoint.state.get("logged")
        if logged is None:  # of checkpoints of before
            self.logged = (self.step, self.seconds)
        else:
            self.logged = (int(logged["at"][0]), float(logged["at"][1]))
            self.means.restore(logged)
        if len(checkpoint.random) == self.accelerator.num_processes:
            set_random_state(checkpoint.random[self.accelerator.process_index])


def _moments(state: Mapping[str, Any]) -> int:
    """How many moments and counts an optimiser keeps; of a parameter that no loss has reached yet it keeps none."""
    return sum(len(entries) for entries in state["state"].values())


def _check_groups(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups of an optimiser that are not those that were built.

    The settings of a checkpoint are compared before, so they differ where a version chose them by another rule. torch
    would raise for other sizes, and go on with the weight decay of the checkpoint.
    """
    saved, built = (
        [(len(group["params"]), float(group["weight_decay"])) for group in groups] for groups in (then, now)
    )
    if saved != built:
        raise CheckpointError(
            "the checkpoint was written by a version that gave weight decay to other parameters (parameters and "
            f"weight_decay of each group: {_listed(saved)} then, {_listed(built)} now): go on with that version, or "
            "begin a new run in another `out`."
        )


def _listed(groups: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"{count} with {decay:g}" for count, decay in groups)


def _gathered(random: dict[str, Any], accelerator: Accelerator) -> list[dict[str, Any]]:
    """Those of all processes."""
    if accelerator.num_processes == 1:
        return [random]
    from accelerate.utils import gather_object

    return gather_object([random])
