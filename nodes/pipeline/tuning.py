"""Tuning a diffusers pipeline under ComfyUI: what the node asks for, checked, carried out and told.

No ComfyUI module is imported here. A run is stopped by what stops every other (`Residency`), before each pass of the
model; what was measured until then is in the journal, and the same inputs go on with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ...generation.errors import BadInput
from ...generation.requests.settings import Settings
from ...generation.tuning.api import carried_out
from ...generation.tuning.budget import Budget
from ...generation.tuning.plan import PAGE, PRESET, Plan, planned
from ...generation.tuning.progress import Counted
from ...generation.tuning.result import FOUND, NOTHING, Tuned
from ...generation.tuning.space import CACHES, METHODS
from ...generation.tuning.trajectory import Clock
from ...pipelines.presets import Preset
from ..report.wording import InputError, plain_messages
from .pipelines import VideoPipeline, require_packages

if TYPE_CHECKING:
    from ...attention import Method

LEVERS = ("sparse", "cache", "precision", "compile", "adapter", "guidance")
"""What a pipeline of ComfyUI's can have of them: its weights are moved as they are, and not in 8 bits."""

SETTINGS = ("negative_prompt", "frames", "height", "width", "steps", "guidance_scale")
"""Of a video."""
PACKAGES = ("torchmetrics>=1.4", "jinja2>=3.1")
"""What compares videos and writes the page, besides the packages of pipelines."""

LONGEST = 255
"""Bytes of a folder's name, in the usual file systems."""


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Args:
        preset: the chosen one; where dense is the fastest, one without a lever.
        text: what was found, what was tried, and where the page is.
    """

    preset: Preset
    text: str


def tuned(
    pipeline: VideoPipeline,
    prompts: str,
    folder: Path,
    *,
    bounds: Mapping[str, float],
    levers: Sequence[str],
    effort: str,
    confirm: int,
    seed: int,
    settings: Mapping[str, Any],
    show: Callable[[int, int | None], None] = lambda done, total: None,
    clock: Clock = time.perf_counter,
) -> Tuning:
    """Find the fastest preset for a pipeline, see `vidaccel.tune`.

    Args:
        pipeline: without levers of its own.
        prompts: one a line.
        folder: of the journal, the page and the preset; see `folder_of`.
        bounds: of a `Budget`; 0 is none.
        levers: of `LEVERS`.
        effort, confirm: see `vidaccel.tune`.
        seed: of the first video; the others have the next ones.
        settings: of `Settings`; None takes the model's own.
        show: told how many measurements are done, of how many at the most.
        clock: of all times.

    Raises:
        InputError: levers are there already or none is asked for, a value is out of its bounds, the folder holds
            measurements of something else, or nothing is within the budget, with the nearest.
    """
    require_packages("tuning needs", PACKAGES)
    _check_plain(pipeline)
    texts = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not texts:
        raise InputError("prompts is empty: give one a line; four to eight are enough to choose by.")
    with plain_messages():
        if not levers:
            raise BadInput("levers", "are all off", "Switch one on.")
        size = Settings(texts[0], **settings).checked(pipeline.facts)
        plan = planned(
            pipeline.pipe,
            texts,
            seed,
            out=folder,
            budget=Budget(**{name: value or None for name, value in bounds.items()}),
            levers=levers,
            methods=METHODS if "sparse" in levers else (),
            caches=CACHES if "cache" in levers else (),
            effort=effort,
            confirm=confirm,
            settings={name: getattr(size, name) for name in SETTINGS},
            placing={},
            facts=pipeline.facts,
        )
        pipeline.residency.begin(pipeline.pipe, plan.job.layout, plan.job.settings, _neediest(plan))
        counted = Counted(show)
        made = carried_out(plan, clock=clock, shown=nullcontext((counted.tell, counted.expect)))
    text = _told(made, folder)
    if made.outcome == NOTHING:
        raise InputError(f"{made.in_words()} {folder / PAGE} shows all that was tried.")
    return Tuning(made.preset or Preset(name="dense", summary=made.in_words()), text)


def folder_of(name: str, root: Path) -> Path:
    """Where the files of a tuning go: a folder below ComfyUI's output.

    Raises:
        InputError: no name, one that leads out of there, or one that no folder can have.
    """
    place = PurePath(name.strip())
    if not place.parts or place.is_absolute() or ".." in place.parts or place.drive:
        raise InputError(f"name is {name!r}: it must be the name of a folder below ComfyUI's output, such as tune/wan.")
    if "\0" in name:
        raise InputError(f"name is {name!r}: a folder's name has no null byte. Leave it out.")
    for part in place.parts:
        if (size := len(part.encode(errors="replace"))) > LONGEST:
            told = f"name has a part of {size} bytes, {part[:20]}...: a folder's name has {LONGEST} at the most"
            raise InputError(f"{told}. Shorten it.")
    return root / place


def is_written(folder: Path) -> bool:
    """Whether a folder has what a tuning leaves there."""
    return (folder / PAGE).is_file()


def _check_plain(pipeline: VideoPipeline) -> None:
    there = {
        "Accelerate Pipeline": pipeline.acceleration,
        "Guidance-Free Pipeline": pipeline.guidance_free,
        "Apply Preset": pipeline.preset,
        "a LoRA that was trained for one attention alone": pipeline.trained,
    }
    for node, is_there in there.items():
        if is_there:
            raise InputError(f"pipeline has {node} before it: connect the one from before, to which levers are added.")


def _neediest(plan: Plan) -> Method | None:
    """The method that takes the most memory beside the model, so that ComfyUI makes room for all."""
    from ...generation.levers.methods import build_method

    row, layout = plan.job.facts.row, plan.job.layout
    found: list[Method] = []
    for name in plan.methods:
        try:
            found.append(build_method(name, layout))
        except BadInput:
            continue  # it is dropped at this size, which the search tells
    heads = row.heads(plan.job.facts.transformer)
    return max(found, key=lambda method: method.table_bytes(layout, *heads, plan.job.dtype.itemsize), default=None)


def _told(made: Tuned, folder: Path) -> str:
    lines = [
        made.in_words(),
        "",
        f"{made.settings['model']}; {made.settings['size']}; dense {made.dense_seconds:.3g} s",
    ]
    for each in made.confirmed:
        own = each.confirmed
        why = each.why or "chosen"
        # Measured in turns, the gain is not the one that the seconds would have.
        gain = f"{1 / own.ratio:.2f} times as fast{' in turns with dense' * bool(own.gain)}"
        lines.append(f"{own.median:.3g} s, {gain}, {own.mean_psnr:.1f} dB: {each.candidate.label} ({why})")
    lines += [*made.notes, *(f"{name} is left out: {why}" for name, why in made.dropped.items())]
    lines += ["", f"page: {folder / PAGE}"]
    lines += [f"preset: {folder / PRESET}"] if made.outcome == FOUND else []
    return "\n".join(lines)
