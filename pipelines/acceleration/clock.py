"""Counts runs, denoising steps and guidance branches, from the scheduler's own count wherever it has one.

A scheduler of diffusers has a table of timesteps, which `set_timesteps` makes anew for each run, and most count their
place in it (`step_index`): that count is the step, whatever values the model is given. So it is right for second-order
schedulers, whose tables hold a value twice, for half precision, in which neighbouring values coincide, for tables that
rise, and for models that are given a noise level instead of a timestep. Where there is no such count, values tell:

- a scheduler that does not count (DDIM and its kin): a value is looked up in the table, from the place reached onwards;
- one that never steps, because the pipeline steps copies of it (diffusion forcing, where frames have timesteps of their
  own): its table counts while the values follow it, and else each change is a step;
- one that stands still because another pipeline runs the transformer, or none at all, for a transformer alone: values
  that go on in one direction are steps, one that turns back begins a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from ...attention import CallRecord, StepInfo


class _By(Enum):
    """What tells the step."""

    COUNT = "the scheduler's count"
    TABLE = "a look at its table"
    CHANGE = "a change of the values"


@dataclass(frozen=True)
class _Reading:
    """What a forward pass was given: the highest timestep of its tokens, and their sum, which may move alone."""

    value: float
    total: float

    @classmethod
    def of(cls, timestep: torch.Tensor) -> _Reading:
        wide = timestep.detach().float()
        return cls(*torch.stack([wide.max(), wide.sum()]).tolist())  # one wait for a GPU


@dataclass
class _Run:
    """One pass through the table, or through values that go in one direction.

    Args:
        number: counted from 0.
        by: what tells the step.
        table: of the scheduler at its start; `rows` are its values.
        place: in the table, or a count of changes.
        first: the place of the first step.
        reading: of the last pass.
        planned: whether the pipeline that made the table makes the run, so that its own plan holds.
        stepped: whether the scheduler was seen to count.
        direction: of the values: -1 falling, 1 rising, 0 not known yet.
        passes: of each model at this place.
        usual: of each model at the first place that was left, which tells a collision from another branch.
    """

    number: int
    by: _By
    table: torch.Tensor | None
    rows: tuple[float, ...]
    place: int
    first: int
    reading: _Reading
    planned: bool = True
    stepped: bool = False
    direction: int = 0
    passes: dict[str, int] = field(default_factory=dict)
    usual: dict[str, int] = field(default_factory=dict)

    def go_to(self, place: int) -> _Run:
        for model, count in self.passes.items():
            self.usual.setdefault(model, count)
        self.place, self.passes = place, {}
        return self

    def again(self, reading: _Reading, place: int = 0) -> _Run:
        """Another run under the same table."""
        fresh = {"passes": {}, "usual": {}, "stepped": False, "direction": 0, "reading": reading}
        return replace(self, number=self.number + 1, place=place, first=place, **fresh)


class StepClock:
    """Tells the run, the step and the guidance branch of each forward pass.

    One clock serves all transformers of a pipeline, so the second transformer of Wan 2.2 goes on counting where the
    first stopped. Steps count from the first one that is run: video-to-video at half strength starts at step 0 of half
    as many. A pipeline that makes a table for each chunk or section of a video makes a run of each.

    Args:
        scheduler: gives the pipeline's scheduler of now (people swap it between runs); None when there is no pipeline.
        planned: gives the number of steps that the pipeline says it will make (`num_timesteps`), asked only where the
            table does not tell; None when it says none.
    """

    def __init__(self, scheduler: Callable[[], Any], planned: Callable[[], int | None] = lambda: None) -> None:
        self._scheduler, self._planned = scheduler, planned
        self._run: _Run | None = None
        self.notes: list[str] = []
        """What a reader of a report should know of the counting."""

    def observe(self, timestep: torch.Tensor, model: str, branches: tuple[str, ...]) -> StepInfo:
        """Read one forward pass.

        Args:
            timestep: as the transformer got it: 0-dim, `[B]`, `[B, frames]`, or `[B, tokens]` for Wan 2.2's image
                conditioning, whose clean tokens have a timestep of 0.
            model: the component that is called.
            branches: names for the passes of one step, in order.
        """
        reading, scheduler, run = _Reading.of(timestep), self._scheduler(), self._run
        table = getattr(scheduler, "timesteps", None)
        if run is None or (table is not None and table is not run.table):
            run = self._begun(scheduler, table, reading)
        elif run.by is _By.COUNT:
            run = self._counted(scheduler, run, reading, model, len(branches))
        else:
            run = self._told_by_values(run, reading, model, len(branches))
        self._run, run.reading = run, reading
        number = run.passes.get(model, 0)
        run.passes[model] = number + 1
        branch = branches[number] if number < len(branches) else f"pass {number}"
        return StepInfo(run.number, run.place - run.first, self._steps(run), _noise_level(scheduler, run), branch)

    def _begun(self, scheduler: Any, table: torch.Tensor | None, reading: _Reading) -> _Run:
        """A run under a new table, at the place where its scheduler begins, or else where its first value stands."""
        number = 0 if self._run is None else self._run.number + 1
        if table is None:
            return _Run(number, _By.CHANGE, None, (), 0, 0, reading)
        rows = tuple(table.float().tolist())
        by = _By.COUNT if hasattr(scheduler, "step_index") else _By.TABLE
        index, begin = getattr(scheduler, "step_index", None), getattr(scheduler, "begin_index", None)
        known = begin if index is None else index
        place = _find(reading.value, rows) or 0 if known is None else known
        run = _Run(number, by, table, rows, place, place, reading, stepped=index is not None)
        return run if place < len(rows) else self._of_another(scheduler, run, reading)

    def _counted(self, scheduler: Any, run: _Run, reading: _Reading, model: str, branches: int) -> _Run:
        index = scheduler.step_index
        if index is None and run.stepped:
            return run.again(reading, run.first)  # set back without a new table
        place = run.first if index is None else index
        if place >= len(run.rows):
            return self._of_another(scheduler, run, reading)  # it is at its end, and somebody goes on
        if place < run.place:
            return run.again(reading, place)
        if place > run.place:
            run.stepped = True
            return run.go_to(place)
        if reading.value == run.reading.value and (run.stepped or reading == run.reading):
            return run
        if run.stepped:
            return self._of_another(scheduler, run, reading)
        # It has never stepped: copies of it do. Its table still tells, if the values go on in it.
        follows = run.place + 1 < len(run.rows) and _find(reading.value, run.rows, run.place) == run.place + 1
        run.by = _By.TABLE if follows else _By.CHANGE
        if not follows and reading.value != run.reading.value:
            self._note(scheduler)
            run.planned = False
        return self._told_by_values(run, reading, model, branches)

    def _of_another(self, scheduler: Any, run: _Run, reading: _Reading) -> _Run:
        self._note(scheduler)
        number = run.number if self._run is None or run is not self._run else run.number + 1
        return _Run(number, _By.CHANGE, run.table, (), 0, 0, reading, planned=False)

    def _note(self, scheduler: Any) -> None:
        text = (
            f"steps are counted by the timesteps alone, since {type(scheduler).__name__} stands still: another "
            "pipeline seems to run the transformer, with a scheduler of its own; accelerate that one"
        )
        if text not in self.notes:
            self.notes.append(text)

    def _told_by_values(self, run: _Run, reading: _Reading, model: str, branches: int) -> _Run:
        if reading == run.reading:
            return self._repeated(run, reading, run.passes.get(model, 0), run.usual.get(model), branches)
        moved = reading.value != run.reading.value
        if run.by is _By.TABLE and moved:
            place = _find(reading.value, run.rows, run.place)
            if place is not None:
                return run.go_to(place)
            earlier = _find(reading.value, run.rows)
            if earlier is not None:
                return run.again(reading, earlier)
        # Frames with timesteps of their own, or values that are in no table.
        run.by = _By.CHANGE
        change = reading.value - run.reading.value if moved else reading.total - run.reading.total
        direction = 1 if change > 0 else -1
        if run.direction not in (0, direction):
            return run.again(reading)
        run.direction = direction
        return run.go_to(run.place + 1)

    @staticmethod
    def _repeated(run: _Run, reading: _Reading, passes: int, usual: int | None, branches: int) -> _Run:
        """The same values again: another branch, the next of two rows that look alike, or a loop at one timestep."""
        if usual is not None and passes >= usual:
            after = run.place + 1
            if run.by is _By.CHANGE or (after < len(run.rows) and _near(reading.value, run.rows[after])):
                return run.go_to(after)
        elif usual is None and run.table is None and passes >= branches:
            # Nothing else tells a profiler's loop, say, from ever more branches.
            return run.again(reading)
        return run

    def _steps(self, run: _Run) -> int | None:
        """How many steps the run has; None when nothing tells."""
        if run.by is not _By.CHANGE:
            return len(run.rows) - run.first
        return self._planned() if run.planned and run.table is not None else None


def miscounts(records: Iterable[CallRecord]) -> list[str]:
    """What to say of runs whose last step is not the last that was expected, so that no count is wrong in silence."""
    seen: dict[int, int] = {}
    expected: dict[int, int | None] = {}
    for record in records:
        seen[record.run] = max(seen.get(record.run, 0), record.step + 1)
        expected[record.run] = record.num_steps
    return [
        f"run {run}: steps seen {count}, expected {expected[run]}: it was stopped, is not done yet, or was miscounted"
        for run, count in seen.items()
        if expected[run] not in (None, count)
    ]


def _near(value: float, row: float) -> bool:
    """Whether a value may be a row of the table in bfloat16, which keeps 8 bits."""
    return abs(row - value) <= max(1e-3, abs(value) / 256)


def _find(value: float, rows: tuple[float, ...], start: int = 0) -> int | None:
    """The row from `start` on that is nearest to a value, the first of equals; None where none is near."""
    if start >= len(rows):
        return None
    place = min(range(start, len(rows)), key=lambda i: abs(rows[i] - value))
    return place if _near(value, rows[place]) else None


def _noise_level(scheduler: Any, run: _Run) -> float | None:
    """The share of noise at the step; None for schedulers whose levels are not a flow's, from 0 to 1."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or run.by is _By.CHANGE or run.place >= len(sigmas) or float(sigmas.max()) > 1.001:
        return None
    level = float(sigmas[run.place])
    # A table that rises (Mochi's) counts what is clean.
    return 1 - level if run.rows[-1] > run.rows[0] else level
