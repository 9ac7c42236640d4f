"""What was done in the samplings of one patched MODEL, and what a report node shows of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ...attention import CallRecord, RunReport, SparseAttention, VideoLayout
from ...attention.account.records import KEPT_RUNS
from ...attention.account.timing import Span
from ..native.calls import ForwardPass
from .cache_log import CacheLog
from .news import CACHED, NEVER, News, nothing

logger = logging.getLogger(__name__)

DROPPED = f"records of earlier samplings were dropped: those of the last {KEPT_RUNS} are kept"


class RunLog:
    """Runs, their calls and what was noted of them. A run is one sampling.

    Args:
        name: of the method. settings: what the report shows as its settings.
    """

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings
        self.beside: tuple[CacheLog, ...] = ()
        """Of the caches that were put into the MODEL with it, whose notes the report has, too."""
        self._engines: dict[VideoLayout, SparseAttention] = {}  # the one used last is the last
        self._used: dict[VideoLayout, int] = {}  # -> the last run that used its engine
        self._dense_calls: list[tuple[list[CallRecord], Span]] = []
        self._notes: dict[str, int] = {}  # -> the last run that it was true of
        self._told: dict[str, int] = {}  # likewise, of what is no fallback
        self._run = -1
        self._first = 0  # of the runs of the queue's last entry
        self._reported = -1  # the last run that a report has shown
        self._queued: str | None = None

    @property
    def title(self) -> str:
        """Of the node, in errors and in the log."""
        return f"Sparse Attention ({self.name})"

    def count(self, queued: str | None) -> None:
        """A run begins, of an entry of ComfyUI's queue; None where nobody says which."""
        self._run += 1
        if queued != self._queued:
            self._queued, self._first = queued, self._run
        self._dense_calls = [c for c in self._dense_calls if c[0][0].run > self._run - KEPT_RUNS]

    def note(self, text: str, level: int = logging.INFO) -> None:
        """Log a fallback or a choice once and keep it for the report."""
        if text not in self._notes:
            logger.log(level, "%s: %s", self.title, text)
        self._notes[text] = self._run

    def tell(self, text: str, level: int = logging.INFO) -> None:
        """Log what was done for the sampler that starts next once, and keep it for the report."""
        if text not in self._told:
            logger.log(level, "%s: %s", self.title, text)
        self._told[text] = self._run + 1

    def report(self) -> RunReport:
        """What was done in the last runs, dense calls and their reasons included."""
        reports = [engine.report() for engine in self._engines.values()]
        records = [record for report in reports for record in report.records]
        for calls, span in self._dense_calls:
            records += [replace(call, attention_seconds=span.seconds() / len(calls)) for call in calls]
        records = [record for record in records if record.run > self._run - KEPT_RUNS]
        # A stable sort: the calls of one layer stay in the order of the guidance branches.
        records.sort(key=lambda r: (r.run, r.step, r.layer))
        notes = dict.fromkeys(
            [*self._told, *self._notes, *(note for engine in self._engines.values() for note in engine.notes)]
        )
        if self._run >= KEPT_RUNS:
            notes[DROPPED] = None
        return RunReport(self.name, self.settings, tuple(records), tuple(notes))

    def news(self, queued: str | None = None) -> News:
        """What was done for an entry of the queue: what no report has shown yet (two samplers may share a model), or
        all of it where another report node has.

        Args:
            queued: the entry that the report node is run for; None where nobody says.
        """
        if self._run < 0:
            return nothing(NEVER)
        is_new, is_known = self._run > self._reported, None not in (queued, self._queued)
        heading = "" if (queued == self._queued if is_known else is_new) else CACHED
        first = self._first if is_known else self._run
        if is_new and not heading:
            first = max(self._first, self._reported + 1)
            self._reported = self._run
        report = self.report()
        records = tuple(record for record in report.records if record.run >= first)
        true_of = {**self._told, **self._notes, DROPPED: self._run - KEPT_RUNS}
        for engine in self._engines.values():
            for note, run in engine.noted.items():
                true_of[note] = max(run, true_of.get(note, run))
        notes = tuple(note for note in report.notes if true_of.get(note, -1) >= first)
        last = self._run + 1 - first
        notes += tuple(note for log in self.beside for note in log.news(queued, last).report.notes)
        return News(replace(report, records=records, notes=notes), heading)

    def _record(self, current: ForwardPass, layer: int, reason: str, span: Span) -> None:
        """A call that stayed dense: one record for each branch of its batch, as a sparse call has."""
        calls = [
            CallRecord(
                run=current.step.run,
                step=current.step.step,
                num_steps=current.step.num_steps,
                branch=branch,
                model=current.geometry.family,
                layer=layer,
                method=self.name,
                density=1.0,
                reason=reason,
                backend="ComfyUI",
                plan_seconds=0.0,
                attention_seconds=0.0,
                details={},
            )
            for branch in current.branches
        ]
        self._dense_calls.append((calls, span))
