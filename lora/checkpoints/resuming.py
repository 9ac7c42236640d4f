"""What a run that is continued must have as its checkpoint has it, and what is said of what it need not."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from ..config import flat
from ..distributed.step_clips import phases_in
from ..recipes.base import Phase
from ..settings import RunSettings
from .begun_from import KEPT
from .checkpoint import Checkpoint, CheckpointError, CheckpointFolder


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


def check_inputs(then: dict[str, str], now: dict[str, str], kept: Collection[str]) -> None:
    """Refuse to go on with other models or data than those of the checkpoint, wherever they lie.

    Args:
        then, now: what they are, by setting.
        kept: settings of adapters that the run began from, of which it keeps what it needs.

    Raises:
        CheckpointError: they differ.
    """
    different = [name for name in sorted(then) if now.get(name) != then[name]]
    if different:
        raise CheckpointError(
            "the run cannot be continued, because these do not hold what they held when it began (they may be moved, "
            f"but not changed): {', '.join(different)}.{''.join(_counts(different, kept))}"
        )


def _counts(different: Sequence[str], kept: Collection[str]) -> Iterator[str]:
    """What counts of inputs, where one may not expect it, and what to do."""
    if any(name.startswith("data.") for name in different):
        yield (
            " Of data, clips and captions count, and the order of the files, which is that of their names: give files "
            "that were added, removed or renamed their old places."
        )
    for name in sorted(KEPT.intersection(different)):
        if name in kept:
            yield f" {name}: give what the checkpoint's config.yaml has there, of which the run keeps what it needs."
        else:
            yield f" {name}: give the adapter as it was when the run began, of which the run keeps no copy."


def check_steps(
    path: Path,
    checkpoint: Checkpoint,
    phases: Sequence[Phase],
    folder: CheckpointFolder,
    then: RunSettings,
    now: RunSettings,
) -> list[Phase]:
    """Refuse a checkpoint that is further than the steps of now, and other steps of phases that are over.

    Args:
        path: where the checkpoint lies.
        checkpoint: to go on from.
        phases: of the run, all of them.
        folder: with the other checkpoints.
        then, now: settings of the checkpoint, and those of the phases.

    Returns:
        The phases that are over.

    Raises:
        CheckpointError: its phase is none of the run, or has fewer steps than were done in it; or phases that are over
            had other steps, which would stand in the settings of a result without having been made.
    """
    names = [phase.name for phase in phases]
    if checkpoint.phase not in names:
        raise CheckpointError(f"{path} is in the phase {checkpoint.phase}, which this recipe does not have.")
    number = names.index(checkpoint.phase)
    over, steps = list(phases[:number]), phases[number].settings.steps
    if not steps:
        raise CheckpointError(f"{path} is in the phase {checkpoint.phase}, whose steps are 0 now: set 1 or more.")
    if checkpoint.step > steps:
        earlier = folder.latest_of(checkpoint.phase, steps)
        instead = "" if earlier is None else f", or take --resume {shlex.quote(str(earlier))}"
        raise CheckpointError(
            f"{path} is after step {checkpoint.step} of the phase {checkpoint.phase}, whose steps are {steps} now: "
            f"give {checkpoint.step} or more{instead}."
        )
    different = [
        f"{where}.steps: {was.steps} then, {here.steps} now"
        for (where, was), (_, here) in zip(phases_in(then), phases_in(now), strict=True)
        if was.steps != here.steps and any(here is phase.settings for phase in over)
    ]
    if different:
        raise CheckpointError(
            f"{path} is in the phase {checkpoint.phase}, and a phase that is over keeps its steps:\n  "
            + "\n  ".join(different)
        )
    return over
