"""The records of an engine, some of whose numbers are still on a GPU until somebody asks for them.

To read a number the host waits for the GPU, and a run makes thousands of records: nothing is read between two runs, and
all at once for a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..schedule import StepInfo
from .records import CallRecord, OfACall, call_of, first_kept
from .timing import Span

KEPT_PENDING = 40_000
"""Records above which those that are pending are read when a run begins: each has some small tensors and events."""


@dataclass
class Pending:
    """A record whose numbers may still be on their way from the GPU.

    Args:
        step, layer, reason, backend: see `CallRecord`.
        plan: pairs that are computed, and those in dense attention; None for a dense call.
        plan_span, attention_span, error_span: what `CallRecord` has in seconds.
        details, error: see `CallRecord`.
    """

    step: StepInfo
    layer: int
    reason: str
    backend: str
    plan: tuple[torch.Tensor, int] | None
    plan_span: Span | None
    attention_span: Span
    details: dict[str, Any]
    error: torch.Tensor | None = None
    error_span: Span | None = None

    @property
    def run(self) -> int:
        """The run of its step."""
        return self.step.run

    @property
    def call(self) -> int | None:
        """The call of the pipeline, where that is known."""
        return self.step.call

    def tensors(self) -> list[torch.Tensor]:
        """What has to be read, in the order in which `finished` takes it."""
        counted = [] if self.plan is None else [self.plan[0]]
        measured = [] if self.error is None else [self.error]
        return [*counted, *measured, *(x for x in self.details.values() if isinstance(x, torch.Tensor))]

    def finished(self, model: str, method: str, values: Sequence[Any]) -> CallRecord:
        """The record.

        Args:
            model, method: see `CallRecord`.
            values: of `tensors`.
        """
        left = iter(values)
        return CallRecord(
            run=self.step.run,
            step=self.step.step,
            num_steps=self.step.num_steps,
            branch=self.step.branch,
            model=model,
            layer=self.layer,
            method=method,
            density=1.0 if self.plan is None else next(left) / self.plan[1],
            error=None if self.error is None else next(left),
            reason=self.reason,
            backend=self.backend,
            plan_seconds=self.plan_span.seconds() if self.plan_span else 0.0,
            attention_seconds=self.attention_span.seconds(),
            details={k: next(left) if isinstance(x, torch.Tensor) else x for k, x in self.details.items()},
            error_seconds=self.error_span.seconds() if self.error_span else 0.0,
            call=self.step.call,
        )


class KeptRecords:
    """The records of an engine, of the last calls; see `records.first_kept`.

    A report may be asked for in another thread than the one that adds records.

    Args:
        model, method: see `CallRecord`.
    """

    def __init__(self, model: str, method: str) -> None:
        self._model, self._method = model, method
        self._calls: dict[int, list[CallRecord | Pending]] = {}
        self.oldest_run = 0
        """Of which records are kept; above 0 where older ones were dropped."""

    def add(self, record: Pending) -> None:
        """Take one more."""
        self._calls.setdefault(call_of(record), []).append(record)

    def begin(self, now: OfACall) -> int:
        """Drop what is no longer kept, unread, where a run begins.

        Args:
            now: the run.

        Returns:
            The first of the calls that are kept.
        """
        counts = {call: len(records) for call, records in self._calls.items()}
        first = first_kept(counts, now)
        for call in counts:
            if call < first:
                del self._calls[call]
        if counts and min(counts) < first:
            oldest = self._calls[min(self._calls)] if self._calls else []
            self.oldest_run = min((record.run for record in oldest), default=now.run)
        if sum(count for call, count in counts.items() if call >= first) > KEPT_PENDING:
            pending = (isinstance(record, Pending) for records in self._calls.values() for record in records)
            if sum(pending) > KEPT_PENDING:
                self._read()
        return first

    def all(self) -> list[CallRecord]:
        """All of them, call by call, read."""
        made = [record for records in self._read().values() for record in records]
        return [replace(record, details=dict(record.details)) for record in made]  # theirs to change

    def _read(self) -> dict[int, list[CallRecord]]:
        calls = {call: (records, list(records)) for call, records in sorted(self._calls.items())}
        pending = [record for _, now in calls.values() for record in now if isinstance(record, Pending)]
        tensors = [record.tensors() for record in pending]
        values = iter(_values([x for each in tensors for x in each]))
        read: dict[int, list[CallRecord]] = {}
        for call, (records, now) in calls.items():
            read[call] = made = []
            for place, record in enumerate(now):
                if isinstance(record, Pending):
                    given = [next(values) for _ in record.tensors()]
                    record = records[place] = record.finished(self._model, self._method, given)
                made.append(record)
        return read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": self._read()}  # events on a GPU cannot be copied


def _values(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """What `tolist()` of each gives, with one copy from each device for each dtype."""
    found: list[Any] = [None] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, x in enumerate(tensors):
        groups.setdefault((x.device, x.dtype), []).append(place)
    with torch.no_grad():
        for (device, _), places in groups.items():
            those = [tensors[place] for place in places]
            if device.type != "cpu":
                flat = torch.cat([x.reshape(-1) for x in those]).cpu()
                parts = flat.split([x.numel() for x in those])
                those = [part.view(x.shape) for part, x in zip(parts, those, strict=True)]
            for place, x in zip(places, those, strict=True):
                found[place] = x.tolist()
    return found
