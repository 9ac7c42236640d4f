"""What an account says of levers that did nothing: a cache that skipped no pass, a method that made no step sparse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ...attention.account.records import CallRecord
from ..forecast.settings import FIRST
from .levers import CACHES, FORECAST, Cache, forecast_settings

if TYPE_CHECKING:
    from .account import PassRecord, StepAccount


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
    counts = [p.num_steps for those in idle.values() for p in those if p.num_steps is not None]
    if cache.name == FORECAST and counts and (settings := forecast_settings(cache)).keeps_all(max(counts)):
        told = f"the first {max(settings.first_steps, FIRST)} (retention_steps) and last {settings.last_steps} "
        lower = "lower these, or " * (max(counts) > FIRST)
        return f"{note}{told}(cache_end_steps) of {max(counts)} steps are computed; {lower}make more steps"
    kept = sum(bool(p.kept) for p in later)
    beside = f" (the schedule keeps {kept} of its {len(later)} passes dense)" if kept else ""
    return f"{note}{CACHES[cache.name].skips_more}{beside}"


def dense_note(steps: Sequence[StepAccount], passes: Sequence[PassRecord], calls: Iterable[CallRecord]) -> str:
    """Why no step was sparse, though a method is at work; "" where one was.

    Args:
        steps: that were made. passes: of all transformers. calls: of sparse attention.
    """
    if not steps or any(step.attention not in ("dense", "-") for step in steps):
        return ""
    left_out = any(p.skipped and not p.extrapolated for p in passes)
    computed = [p for p in passes if not p.skipped]
    if left_out and computed and all(p.kept for p in computed):
        return "no step was sparse: the schedule kept some dense, and the cache skipped all others"
    reasons = Counter(call.reason for call in calls if call.reason)
    told = ", ".join(f"{reason} ({count} calls)" for reason, count in reasons.items())
    others = "; the cache skipped the other steps" if left_out else ""
    return f"no step was sparse, because of: {told}{others}"
