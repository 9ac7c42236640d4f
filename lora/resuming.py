"""What a run that is continued must have as its checkpoint has it, and what is said of what it need not."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import Checkpoint, CheckpointError, CheckpointFolder
from .config import flat
from .recipes.base import Phase
from .settings import RunSettings


def changed(then: RunSettings, now: RunSettings) -> list[str]:
    """A sentence for each setting with which the run does not go on as it would have, and that may change."""
    before, after = flat(then), flat(now)
    return [
        f"{name} is {after[name]:g} from here on, and was {before[name]:g}."
        if None not in (after[name], before[name])
        else f"{name} is {after[name]} from here on, and was {before[name]}."
        for name in after
        if name.endswith((".learning_rate", ".max_grad_norm")) and before.get(name, after[name]) != after[name]
    ]


def check_inputs(then: dict[str, str], now: dict[str, str]) -> None:
    """Refuse to go on with other models or data than those of the checkpoint, wherever they lie.

    Raises:
        CheckpointError: they differ.
    """
    different = [name for name in sorted(then) if now.get(name) != then[name]]
    if different:
        raise CheckpointError(
            "the run cannot be continued, because these do not hold what they held when it began (they may be moved, "
            f"but not changed): {', '.join(different)}."
        )


def check_steps(path: Path, checkpoint: Checkpoint, phases: Sequence[Phase], folder: CheckpointFolder) -> list[Phase]:
    """Refuse a checkpoint that is further than the steps of now.

    Args:
        path: where the checkpoint lies.
        checkpoint: to go on from.
        phases: of the run, all of them.
        folder: with the other checkpoints.

    Returns:
        The phases that are over.

    Raises:
        CheckpointError: its phase is none of the run, or has fewer steps than were done in it; or phases that are over
            have.
    """
    names = [phase.name for phase in phases]
    if checkpoint.phase not in names:
        raise CheckpointError(f"{path} is in the phase {checkpoint.phase}, which this recipe does not have.")
    number = names.index(checkpoint.phase)
    over, steps = list(phases[:number]), phases[number].settings.steps
    if not steps:
        raise CheckpointError(f"{path} is in the phase {checkpoint.phase}, whose steps are 0 now: set 1 or more.")
    before = checkpoint.total_steps - checkpoint.step
    if checkpoint.step > steps:
        earlier = folder.latest_of(checkpoint.phase, steps)
        instead = "" if earlier is None else f", or take --resume {shlex.quote(str(earlier))}"
        raise CheckpointError(
            f"{path} is after step {checkpoint.step} of the phase {checkpoint.phase}, whose steps are {steps} now: "
            f"give {checkpoint.step} or more{instead}."
        )
    if before > (now := sum(phase.settings.steps for phase in over)):
        raise CheckpointError(
            f"{path} comes after {before} steps of {' and '.join(phase.name for phase in over)}, whose steps are {now} "
            "now: a phase that is over has those that it had."
        )
    return over
