"""What an account says of a cache that skipped nothing: it costs time then, and gives none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .levers import CACHES, Cache

if TYPE_CHECKING:
    from .account import PassRecord


def idle_note(cache: Cache, passes: Iterable[PassRecord]) -> str:
    """The runs of which a cache skipped no pass, and what would have it skip some; "" where there are none.

    Args:
        cache: that is at work.
        passes: of all transformers.
    """
    runs: dict[int, list[PassRecord]] = {}
    for each in passes:
        runs.setdefault(each.run, []).append(each)
    # The first step has nothing to go by.
    idle = {run: those for run, those in runs.items() if len({p.step for p in those}) > 1}
    idle = {run: those for run, those in idle.items() if not any(p.skipped and not p.extrapolated for p in those)}
    if not idle:
        return ""
    whose = "" if len(idle) == len(runs) else f" of run {', '.join(map(str, sorted(idle)))}"
    note = f"the cache {cache.name}, with a threshold of {cache.limit:g}, skipped no pass{whose}: "
    later = [p for those in idle.values() for p in those if p.step and not p.extrapolated]
    if all(p.kept for p in later):
        return f"{note}the schedule of sparse attention keeps all steps dense; keep fewer"
    kept = sum(bool(p.kept) for p in later)
    beside = f" (the schedule keeps {kept} of its {len(later)} passes dense)" if kept else ""
    return f"{note}{CACHES[cache.name].skips_more}{beside}"
