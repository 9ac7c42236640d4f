"""The state of a phase in progress, into a checkpoint and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, CheckpointError, random_state, set_random_state
from .sharding import copy_whole, optimizer_state, whole

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .phase_run import PhaseRun


def take(run: PhaseRun) -> Checkpoint:
    """The state of a phase; every process must call this.

    In processes other than the main one it holds no tensors: they only take part in gathering what is sharded, so that
    the copies lie in the memory of the machine once.
    """
    keep, scaler, ema = run.accelerator.is_main_process, run.accelerator.scaler, run.ema
    return Checkpoint(
        phase=run.phase.name,
        step=run.step,
        total_steps=run.total_steps,
        seconds=run.seconds,
        global_batch=run.global_batch,
        trained=run.trained,
        weights=whole(run.named, keep),
        ema=ema.whole(keep) if ema is not None else {},
        state={
            "optimizer": whole(run.optimizer.optimizer.state_dict(), keep),
            "ema_steps": ema.steps if ema is not None else 0,
            "scaler": scaler.state_dict() if scaler is not None else {},
        },
        random=_random_states(run.accelerator),
    )


def restore(run: PhaseRun, checkpoint: Checkpoint) -> None:
    """Bring a phase that was just built to the state of a checkpoint.

    Raises:
        CheckpointError: it is of another number of clips a step, or of another model.
    """
    if checkpoint.global_batch != run.global_batch:
        raise CheckpointError(
            f"the checkpoint was written with {checkpoint.global_batch} clips a step over all processes, now there "
            f"are {run.global_batch}: use as many processes as then, or change batch_size or "
            "gradient_accumulation_steps."
        )
    if set(checkpoint.weights) != set(run.named):
        odd = sorted(set(checkpoint.weights) ^ set(run.named))
        raise CheckpointError(f"the checkpoint has other parameters than this model: {', '.join(odd[:3])}, ...")
    for name, parameter in run.named.items():
        copy_whole(parameter, checkpoint.weights[name])
    if run.ema is not None:
        run.ema.restore(checkpoint.ema, checkpoint.state["ema_steps"])
    inner = run.optimizer.optimizer
    ordered = [p for group in inner.param_groups for p in group["params"]]
    inner.load_state_dict(optimizer_state(checkpoint.state["optimizer"], ordered))
    if run.accelerator.scaler is not None and checkpoint.state.get("scaler"):
        run.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    run.step, run.seconds = checkpoint.step, checkpoint.seconds
    if len(checkpoint.random) == run.accelerator.num_processes:
        set_random_state(checkpoint.random[run.accelerator.process_index])


def _random_states(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Those of all processes."""
    if accelerator.num_processes == 1:
        return [random_state()]
    from accelerate.utils import gather_object

    return gather_object([random_state()])
