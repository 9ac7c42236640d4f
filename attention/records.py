"""What an accelerated run did, call by call."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


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


@dataclass(frozen=True)
class RunReport:
    """The records of one or more runs, with the sums a reader asks for. `str()` is a table.

    Args:
        method: the method's name.
        config: its settings.
        records: in the order of the calls.
        notes: choices and fallbacks, in words.
    """

    method: str
    config: dict[str, Any]
    records: tuple[CallRecord, ...]
    notes: tuple[str, ...] = ()

    def runs(self) -> list[int]:
        """The runs that have records."""
        return sorted({r.run for r in self.records})

    def last(self) -> RunReport:
        """The last run alone."""
        runs = self.runs()
        return replace(self, records=tuple(r for r in self.records if r.run == runs[-1])) if runs else self

    def density_by_step(self) -> dict[int, float]:
        """Mean density of each step, over layers and branches."""
        return {step: float(np.mean(d)) for step, d in sorted(self._densities("step").items())}

    def density_map(self) -> np.ndarray:
        """Mean density `[layers, steps]` over branches; several models are stacked; NaN where no call was made."""
        models = sorted({r.model for r in self.records})
        layers = {(m, r.layer) for r in self.records for m in [r.model]}
        rows = {key: i for i, key in enumerate(sorted(layers, key=lambda key: (models.index(key[0]), key[1])))}
        steps = max((r.step for r in self.records), default=-1) + 1
        total, count = np.zeros((len(rows), steps)), np.zeros((len(rows), steps))
        for r in self.records:
            total[rows[r.model, r.layer], r.step] += r.density
            count[rows[r.model, r.layer], r.step] += 1
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)

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

    def backends(self) -> dict[str, int]:
        """Calls by backend."""
        return dict(Counter(r.backend for r in self.records))

    def dense_reasons(self) -> dict[str, int]:
        """Calls that stayed dense, by reason."""
        return dict(Counter(r.reason for r in self.records if r.reason))

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return asdict(self)

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
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _densities(self, key: str) -> dict[int, list[float]]:
        groups: dict[int, list[float]] = {}
        for record in self.records:
            groups.setdefault(getattr(record, key), []).append(record.density)
        return groups
