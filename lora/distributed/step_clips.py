"""How many clips a step has over all micro-steps and processes: a resumed run must keep it, however they share them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from ..settings import PhaseSettings, RunSettings, SizeSettings


def step_clips_differences(
    old: RunSettings, new: RunSettings, before: int, now: int, done: Collection[PhaseSettings] = ()
) -> list[str]:
    """One line for each phase and size with which a resumed run would have other clips a step.

    Args:
        old: settings of the checkpoint.
        new: those of now, whose phases and sizes are the same but for the numbers of clips.
        before, now: processes then and now.
        done: phases of `new` that are over, whose clips are of no concern any more.
    """
    lines = []
    for (path, then), (_, here) in zip(phases_in(old), phases_in(new), strict=True):
        if not here.steps or any(here is phase for phase in done):
            continue
        for size_then, size_here in zip(_sizes(old, then), _sizes(new, here), strict=True):
            had, has = _factors(then, size_then, before), _factors(here, size_here, now)
            if had[0] * had[1] * had[2] != has[0] * has[1] * has[2]:
                lines.append(_line(path, size_here, had, has))
    return lines


Factors = tuple[int, int, int]


def _factors(phase: PhaseSettings, size: SizeSettings, processes: int) -> Factors:
    return size.batch_size or phase.batch_size, phase.gradient_accumulation_steps, processes


def _line(path: str, size: SizeSettings, then: Factors, now: Factors) -> str:
    total = then[0] * then[1] * then[2]
    micro, rest = divmod(total, now[0] * now[2])
    if rest:
        batch, left = divmod(total, now[1] * now[2])
        fix = "give another batch_size, or as many processes as then" if left else f"give a batch_size of {batch}"
    else:
        fix = f"give {path}.gradient_accumulation_steps={micro}"
    return (
        f"{path}: {_product(then)} then, {_product(now)} now, in steps of {size.frames} frames of {size.height}x"
        f"{size.width}: {fix}"
    )


def _product(factors: Factors) -> str:
    batch, micro, processes = factors
    return (
        f"{batch * micro * processes} clips a step (batch_size {batch} x gradient_accumulation_steps {micro} x "
        f"{processes} process{'es' if processes > 1 else ''})"
    )


def _sizes(config: RunSettings, phase: PhaseSettings) -> tuple[SizeSettings, ...]:
    return getattr(phase, "sizes", None) or config.data.sizes


def phases_in(settings: Any, path: str = "") -> Iterator[tuple[str, PhaseSettings]]:
    """The phases among settings, at any depth, with where they stand."""
    if isinstance(settings, PhaseSettings):
        yield path, settings
    elif is_dataclass(settings):
        for field in fields(settings):
            yield from phases_in(getattr(settings, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(settings, tuple):
        for number, entry in enumerate(settings):
            yield from phases_in(entry, f"{path}.{number}")
