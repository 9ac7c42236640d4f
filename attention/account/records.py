"""What an accelerated run did, call by call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from ..schedule import DenseSchedule
from .plain_values import plain

VERSION = 1
"""Of what `to_dict` gives, here and of an account."""
KEPT_RUNS = 8  # a server that runs for weeks must not keep every record
"""Runs whose records are kept; where a pipeline's calls are known, calls, each with all of its runs."""
KEPT_RECORDS = 100_000
"""Records of an engine above which fewer calls are kept, which may have hundreds of runs each; never less than one."""


@dataclass(frozen=True)
class CallRecord:
    """One self-attention call.

    Args:
        run, step, num_steps, branch: see `StepInfo`.
        model: the component, such as "transformer" or "transformer_2".
        layer: transformer block, counted from 0.
        method: the method that was asked for.
        density: pairs computed over pairs in dense attention; 1.0 for a dense call.
        reason: why the call stayed dense, empty when it was sparse.
        backend: what computed it.
        plan_seconds: time in profiling, clustering and building the plan.
        attention_seconds: time in attention itself, permutations included.
        details: facts of the method, such as the share of temporal heads.
        error: the measured error of the output on some queries, `norm(out - dense) / norm(dense)` over batch and heads,
            where `dense` is what a dense call gives: with the coarse branch of VSA, and without what SLA learned. None
            where it was not measured.
        error_seconds: time in measuring it, which is in no other number here.
        call: of the pipeline, see `StepInfo`.
    """

    run: int
    step: int
    num_steps: int | None
    branch: str
    model: str
    layer: int
    method: str
    density: float
    reason: str
    backend: str
    plan_seconds: float
    attention_seconds: float
    details: dict[str, Any]
    error: float | None = None
    error_seconds: float = 0.0
    call: int | None = None

    @property
    def predicted_error(self) -> float | None:
        """What the method itself expected of `error`; None where it expects nothing.

        Of a batch the root of the mean square, as `error` is where the outputs of its samples have one norm.
        """
        predicted = self.details.get("predicted_error")
        return None if predicted is None else float(np.sqrt(np.mean(np.square(predicted))))

    @property
    def own_error(self) -> float | None:
        """`predicted_error` where the method measured it, as `Tangent` does with a tolerance; else None, in 8 bits too,
        whose own error it does not see.
        """
        return self.predicted_error if self.details.get("error_is_measured") else None


def _worst_first(errors: list[tuple[float | None, CallRecord]]) -> list[CallRecord]:
    """The calls that have an error. NaN, of a model that has gone wrong, is the worst."""
    known = [(float("inf") if np.isnan(error) else error, call) for error, call in errors if error is not None]
    return [call for _, call in sorted(known, key=lambda pair: pair[0], reverse=True)]


@dataclass(frozen=True)
class RunReport:
    """The records of one or more runs, with the sums a reader asks for. `str()` is a table.

    Args:
        method: the method's name.
        config: its settings.
        records: in the order of the calls.
        notes: choices and fallbacks, in words.
        noted: the last call of the pipeline (see `CallRecord`) that a note was true of, where it is of calls.
    """

    method: str
    config: dict[str, Any]
    records: tuple[CallRecord, ...]
    notes: tuple[str, ...] = ()
    noted: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

    def settings(self) -> dict[str, Any]:
        """`config` for readers: what is set, and of a schedule what it keeps dense, field by field."""
        told: dict[str, Any] = {}
        for name, value in self.config.items():
            if isinstance(value, DenseSchedule):
                told |= value.given() or {"first_steps": 0}
            elif value not in ("", None):
                told[name] = value
        return told

    def runs(self) -> list[int]:
        """The runs that have records."""
        return sorted({r.run for r in self.records})

    def last(self) -> RunReport:
        """The last call of the pipeline alone, with all of its runs; where calls are not known, the last run."""
        records = of_last_call(self.records)
        last = call_of(records[0]) if records else 0
        return replace(self, records=records, notes=tuple(n for n in self.notes if self.noted.get(n, last) >= last))

    def density_by_step(self) -> dict[int, float]:
        """Mean density of each step, over layers and branches, and over all runs: `last()` has one call's alone."""
        return {step: float(np.mean(d)) for step, d in sorted(self._densities("step").items())}

    def map_of(self, value: Callable[[CallRecord], float | None]) -> np.ndarray:
        """The mean of a value `[layers, steps]` over branches, and over all runs: `last()` has one call's alone.

        Several models are stacked; NaN where no call has the value.
        """
        rows = {key: i for i, key in enumerate(sorted({(r.model, r.layer) for r in self.records}))}
        steps = max((r.step for r in self.records), default=-1) + 1
        total, count = np.zeros((len(rows), steps)), np.zeros((len(rows), steps))
        for r in self.records:
            found = value(r)
            if found is not None:
                total[rows[r.model, r.layer], r.step] += found
                count[rows[r.model, r.layer], r.step] += 1
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)

    def density_map(self) -> np.ndarray:
        """Mean density `[layers, steps]`, see `map_of`."""
        return self.map_of(lambda r: r.density)

    def error_map(self) -> np.ndarray:
        """Measured error `[layers, steps]`, see `map_of`."""
        return self.map_of(lambda r: r.error)

    def predicted_error_map(self) -> np.ndarray:
        """What the method expected of the error where one was measured `[layers, steps]`, see `map_of`."""
        return self.map_of(lambda r: r.own_error if r.error is None else r.predicted_error)

    def measured(self) -> list[CallRecord]:
        """The calls whose error was measured, the largest error first."""
        return _worst_first([(r.error, r) for r in self.records])

    def measured_by_method(self) -> list[CallRecord]:
        """The calls whose error the method measured itself (`CallRecord.own_error`), the largest first."""
        return _worst_first([(r.own_error, r) for r in self.records])

    def median_error(self) -> float:
        """Median of the measured errors, NaN without any."""
        return float(np.median([r.error for r in self.measured()])) if self.measured() else float("nan")

    def error_in_words(self, first_step: int = 0) -> str:
        """Median and worst measured error and where, with what the method predicted there, or measured itself; what it
        measured itself alone where nothing else was; empty without any.

        Args:
            first_step: from which the reader counts steps.
        """
        calls, of_method = self.measured(), self.measured_by_method()
        if not calls and not of_method:
            return ""
        worst = (calls or of_method)[0]
        model = f" of {worst.model}" if len({r.model for r in self.records}) > 1 else ""
        where = f"in layer {worst.layer}{model} at step {worst.step + first_step} ({worst.branch})"
        if not calls:
            median = percent(float(np.median([r.own_error for r in of_method])))
            return (
                f"error of the output in {len(of_method)} sparse calls, on the queries that the method measured: "
                f"median {median}, worst {percent(worst.own_error)} {where}"
            )
        text = (
            f"measured error of the output in {len(calls)} sparse calls: median {percent(self.median_error())}, worst "
            f"{percent(worst.error)} {where}"
        )
        predicted = [r.predicted_error for r in calls if r.predicted_error is not None]
        if predicted:
            told = "measured" if of_method else "predicted"
            text += f"; the method itself {told} a median of {percent(float(np.median(predicted)))}"
            text += f", and {percent(worst.predicted_error)} there" if worst.predicted_error is not None else ""
        return text

    def mean_density(self) -> float:
        """Mean over all calls, NaN without any."""
        return float(np.mean([r.density for r in self.records])) if self.records else float("nan")

    @property
    def plan_seconds(self) -> float:
        """Time in planning, all calls."""
        return sum(r.plan_seconds for r in self.records)

    @property
    def attention_seconds(self) -> float:
        """Time in attention, all calls."""
        return sum(r.attention_seconds for r in self.records)

    @property
    def error_seconds(self) -> float:
        """Time in measuring errors, all calls."""
        return sum(r.error_seconds for r in self.records)

    def backends(self) -> dict[str, int]:
        """Calls by backend."""
        return dict(Counter(r.backend for r in self.records))

    def dense_reasons(self) -> dict[str, int]:
        """Calls that stayed dense, by reason."""
        return dict(Counter(r.reason for r in self.records if r.reason))

    def to_dict(self) -> dict[str, Any]:
        """Everything that is told, in types that JSON knows; null for NaN, and for what is none of them, its text."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "noted"}
        return plain({"version": VERSION, **told})

    def __repr__(self) -> str:
        calls = f"{len(self.records)} calls, mean density {self.mean_density():.3f}" if self.records else "no call yet"
        return f"<vidaccel report of {self.method}: {calls}; print it for a table>"

    def __str__(self) -> str:
        if not self.records:
            return "\n".join([f"{self.method}: no attention call yet.", *(f"note: {note}" for note in self.notes)])
        lines = [f"{self.method}  {', '.join(f'{k}={v}' for k, v in self.config.items())}"]
        lines.append(
            f"{'run':>4} {'step':>5} {'calls':>6} {'sparse':>7} {'density':>8} {'plan s':>8} {'attn s':>8}"
            "  dense because / backend"
        )
        groups: dict[tuple[int, int], list[CallRecord]] = {}
        for record in self.records:
            groups.setdefault((record.run, record.step), []).append(record)
        for (run, step), calls in groups.items():
            why = ", ".join(f"{reason} ({n})" for reason, n in Counter(c.reason for c in calls if c.reason).items())
            backends = "+".join(sorted({c.backend for c in calls}))
            lines.append(
                f"{run:>4} {step:>5} {len(calls):>6} {sum(not c.reason for c in calls):>7} "
                f"{np.mean([c.density for c in calls]):>8.3f} {sum(c.plan_seconds for c in calls):>8.3f} "
                f"{sum(c.attention_seconds for c in calls):>8.3f}  {why or '-'} / {backends}"
            )
        lines.append(
            f"mean density {self.mean_density():.3f}, planning {self.plan_seconds:.2f} s, "
            f"attention {self.attention_seconds:.2f} s"
        )
        if error := self.error_in_words():
            took = f"; measuring took {self.error_seconds:.2f} s" if self.measured() else ""
            lines.append(f"{error}{took}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _densities(self, key: str) -> dict[int, list[float]]:
        groups: dict[int, list[float]] = {}
        for record in self.records:
            groups.setdefault(getattr(record, key), []).append(record.density)
        return groups


class OfACall(Protocol):
    """What was done in a run, as a part of a call of the pipeline where that is known."""

    @property
    def run(self) -> int: ...
    @property
    def call(self) -> int | None: ...


Done = TypeVar("Done", bound=OfACall)


def call_of(done: OfACall) -> int:
    """The call of the pipeline; the run where that is not known."""
    return done.run if done.call is None else done.call


def of_last_call(records: Iterable[Done]) -> tuple[Done, ...]:
    """Those of the last call."""
    records = tuple(records)
    last = max(map(call_of, records), default=None)
    return tuple(record for record in records if call_of(record) == last)


def kept_records(records: Sequence[Done], now: OfACall) -> list[Done]:
    """Those that are kept where a run begins: of the last `KEPT_RUNS` calls, that of the run among them, or of fewer
    where there are more than `KEPT_RECORDS`. A call is kept whole, since means over a part of it would mislead.

    Args:
        records: of one engine. now: the run.
    """
    first = first_kept(Counter(map(call_of, records)), now)
    return [record for record in records if call_of(record) >= first]


def first_kept(counts: Mapping[int, int], now: OfACall) -> int:
    """The first of the calls whose records are kept.

    Args:
        counts: of the records of each call. now: the run that begins.
    """
    kept = 0
    for call in sorted(counts, reverse=True):
        kept += counts[call]
        many = now.call is not None and kept > KEPT_RECORDS and kept > counts[call]
        if call <= call_of(now) - KEPT_RUNS or many:
            return call + 1
    return call_of(now) - KEPT_RUNS + 1


def dropped_note(oldest: int, of: str = "runs") -> list[str]:
    """What a report says where records of the runs before `oldest` were dropped; nothing where that is 0.

    Args:
        oldest: see above. of: what records are kept of, runs or calls of a pipeline.
    """
    if not oldest:
        return []
    fewer = "" if of == "runs" else ", of fewer where these have very many"
    return [f"records before run {oldest} were dropped: those of the last {KEPT_RUNS} {of} are kept{fewer}"]


def percent(share: float) -> str:
    """An error for a reader, in percent with two digits that count: 0.034 %, 1.2 %, 12 %."""
    if not np.isfinite(share) or share == 0:
        return f"{100 * share:g} %"
    digits = max(0, 1 - int(np.floor(np.log10(100 * share))))
    return f"{100 * share:.{min(digits, 6)}f} %"
