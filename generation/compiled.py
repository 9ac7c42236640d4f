"""Runs that are timed, and code that is compiled within them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Made = TypeVar("Made")
TRIES = 3
"""Runs of what is timed, as long as code is compiled on the way: another shape may come in the middle of one."""


def counted(measure: Callable[[], Made]) -> tuple[Made, int]:
    """What `measure` gives, and how many graphs were compiled within it."""
    from ..pipelines.presets.compiling import graphs_made

    before = graphs_made()
    made = measure()
    return made, graphs_made() - before


def uncompiled(measure: Callable[[], Made]) -> tuple[Made, int]:
    """What `measure` gives when no code is compiled within it: it is repeated, up to `TRIES` runs in all.

    Returns:
        That of the last run, and how many graphs were compiled within it all the same.
    """
    for _ in range(TRIES):
        made, graphs = counted(measure)
        if not graphs:
            break
    return made, graphs


def included(graphs: int, seconds: float) -> str:
    """What to say of a run in which graphs were compiled, without a full stop; "" where none was."""
    if not graphs:
        return ""
    count = f"{graphs} graphs were" if graphs > 1 else "a graph was"
    return f"{count} compiled on the way, which its {seconds:.1f} s include"
