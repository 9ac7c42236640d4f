"""Counts runs, denoising steps and guidance branches, from a scheduler's own place in its table."""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakMethod

import torch

from ...attention import StepInfo
from ...attention.account.records import KEPT_RUNS
from ..hooks.running_pipeline import PipelineOfPass, running_pipeline
from .host_reads import place_in
from .one_thread import OneThread
from .scheduler_table import Table, Timestep, read_table

logger = logging.getLogger(__name__)


@dataclass
class _Run:
    """One run so far.

    Args:
        number: counted from 0.
        call: of the pipeline, counted from 0; a call of its own where nobody said that one is going on.
        table: what its steps are rows of; None where distinct timesteps are counted.
        first, place: the first row that was run and the one that is.
        timestep: of the last pass.
        ignored: the table that was there but belongs to somebody else's run.
        counted: steps are counted although there is a table, because the timesteps are not its rows.
        rises: the direction of timesteps that are counted, once it is known.
        passes: of each model in this row. per_row: in the last complete row. first_row: in a row before there is one,
            where that can be told.
        together: some row has had passes of several models.
        seen: the steps that were run. total: how many there should be.
    """

    number: int
    call: int
    table: Table | None
    first: int
    place: int
    timestep: Timestep
    ignored: Table | None = None
    counted: bool = False
    rises: bool | None = None
    passes: Counter[str] = field(default_factory=Counter)
    per_row: dict[str, int] = field(default_factory=dict)
    first_row: dict[str, int] = field(default_factory=dict)
    together: bool = False
    seen: set[int] = field(default_factory=set)
    total: int | None = None

    def move(self, place: int) -> None:
        """Go to a row; the passes of the one before say how many a row has."""
        if place != self.place:
            self.per_row.update(self.passes)
            self.passes.clear()
            self.place = place

    def left(self) -> set[str]:
        """The models that left the row to another one (Wan 2.2), where no row has had passes of both."""
        return set() if self.together else self.per_row.keys() - self.passes.keys()

    def ended(self) -> bool:
        """Whether the last row has had as many passes as the one before, or, of a model that has this row alone, as
        such a row should have."""
        if self.total is None or self.place - self.first < self.total - 1:
            return False
        wanted = self.first_row | self.per_row
        return all(count >= wanted.get(model, math.inf) for model, count in self.passes.items())

    def note(self) -> str:
        """What is wrong with the count, empty if nothing is."""
        if self.total is None:
            if self.ignored is None:
                return ""
            return (
                f"run {self.number}: called outside the schedule of the accelerated pipeline, so its {len(self.seen)} "
                "steps were counted from the timesteps and their expected number is unknown"
            )
        if len(self.seen) == self.total and max(self.seen) == self.total - 1:
            return ""
        return (
            f"run {self.number}: steps seen {len(self.seen)}, expected {self.total}: it was interrupted or failed, "
            "or its loop leaves steps out; later runs are counted anew"
        )


class StepClock:
    """Tells the run, the step and the guidance branch of each forward pass.

    A step is a row of the scheduler's table of timesteps. Diffusers moves `scheduler.step_index` in `scheduler.step()`,
    which comes after the forward passes of a row. So the index at the time of a pass is its row, whatever the model
    gets as timestep: tables may rise, repeat values and be rounded. Before the first `step()`, and for schedulers
    without an index, the place is found by value; the passes of earlier rows tell rows of one value apart. Where there
    is no table to look into (a transformer alone, the run of another pipeline, frames with a timestep each), distinct
    timesteps are counted.

    A run starts with a new table, and where the place falls back. One clock serves all transformers of a pipeline, so
    the second transformer of Wan 2.2 goes on counting where the first stopped. Steps count from the first one that is
    run: video-to-video at half strength starts at step 0 of half as many.

    Args:
        pipe: what is accelerated. Its scheduler is read in each pass, because people swap it between runs; in the calls
            of another pipeline that shares a transformer, it is that one's.
        logs: what is wrong with a run; not where another clock of the pipeline does.
    """

    def __init__(self, pipe: object, logs: bool = True) -> None:
        self._pipe, self._logs = PipelineOfPass(pipe), logs
        self.lost_its_pipeline = False  # a copy of a transformer without the pipeline that tells its steps
        self._number = 0  # of the next run
        self._call = -1  # of the last run
        self._in_call = False  # from where a call of the pipeline began to where it ended, as far as that is told
        self._new_call = True  # whether the next run is the first one of its call
        self._run: _Run | None = None
        self._table: Table | None = None
        self._walked: torch.Tensor | None = None  # what the pipeline's loop goes over, where it says so
        # The last timestep that was told without a look at it, with the version of its tensor.
        self._told_ahead: tuple[weakref.ref[torch.Tensor], int, Timestep] | None = None
        self._sends_rows: bool | None = None  # whether the models get the timesteps of the table, once it is known
        self._notes: dict[int, tuple[int, str]] = {}  # of runs, each with its call
        self._told = -1  # of this run and those before nothing is said any more
        self._forgetful: dict[str, WeakMethod] = {}
        self.threads = OneThread()

    @property
    def scheduler(self) -> Any:
        """That of the pipeline whose pass it is; None where there is none."""
        return getattr(self._pipe(), "scheduler", None)

    def forgets(self, model: str, forget: Callable[[], None]) -> None:
        """Have a method called where a model makes no more passes in a run.

        What it remembers is of no use then, and can be gigabytes, which the second of two transformers and the
        autoencoder have need of.

        Args:
            model: the component.
            forget: the method; it is held weakly.
        """
        self._forgetful[model] = WeakMethod(forget)

    def call_begins(self) -> None:
        """A call of the pipeline begins, whatever became of the one before: its runs belong together."""
        if not self._is_of_another_thread():
            self._in_call = self._new_call = True

    def call_ended(self) -> None:
        """It ended, or failed: a run that comes now is none of it."""
        if not self._is_of_another_thread():
            self._in_call, self._new_call = False, True

    def enter(self, module: torch.nn.Module, model: str) -> None:
        """A forward pass begins, before it is observed; raises RuntimeError where another thread is in its way.

        Args:
            module: that is called. model: the component.
        """
        self.threads.enter(module, model, self._run_goes_on())

    def is_taken(self, module: torch.nn.Module) -> bool:
        """Whether `enter` would raise."""
        return self.threads.is_taken(module, self._run_goes_on())

    def _run_goes_on(self) -> bool:
        return self._run is not None and not self._run.ended()

    def _is_of_another_thread(self) -> bool:
        """Whether the run belongs to a thread that goes on with it: what a call in this one says is not of that run.

        The first pass of this call will be refused, which its progress bar takes for the end of a run.
        """
        return self.threads.is_elsewhere(self._run_goes_on())

    def passed(self) -> None:
        """A forward pass ended. After the last one of a run, what all of its models remember is forgotten."""
        if self._run is not None and self._run.ended():
            self._forget({*self._run.passes, *self._run.per_row})

    def stopped(self) -> None:
        """No more passes come, whatever the run was to have: what all models remember is forgotten."""
        if not self._is_of_another_thread():
            self._forget(set(self._forgetful))

    def walks(self, timesteps: object) -> None:
        """A loop over steps begins. What it goes over may be the table of the scheduler, or a part of it.

        Args:
            timesteps: what the loop was given to go over, of whatever kind.
        """
        if not self._is_of_another_thread():
            self._walked = timesteps if isinstance(timesteps, torch.Tensor) else None

    def _forget(self, models: set[str]) -> None:
        for model in models & self._forgetful.keys():
            forget = self._forgetful[model]()
            if forget is not None:
                forget()

    def __deepcopy__(self, memo: dict[int, object]) -> StepClock:
        # A transformer that is copied alone must not bring a copy of its pipeline.
        was = self._pipe.given
        new = StepClock(memo.get(id(was)), self._logs)
        new._number, new._call = self._number, self._call
        new.lost_its_pipeline = new._pipe.given is None and hasattr(was, "scheduler")
        return new

    def observe(self, timestep: torch.Tensor, model: str, branches: tuple[str, ...]) -> StepInfo:
        """Read one forward pass.

        Args:
            timestep: as the transformer got it: 0-dim, `[B]`, or with a value for each frame or token.
            model: the component that is called.
            branches: names for the passes of one step, in order.

        Raises:
            ValueError: the timestep has no value.
        """
        if timestep.numel() == 0:
            raise ValueError(f"{model} was called with an empty timestep, of shape {list(timestep.shape)}.")
        table = self._table = read_table(self.scheduler, self._table)
        now = self._foretold(timestep, table) or Timestep.of(timestep, table)
        ignored: Table | None = None
        if table is None:
            place, ignored = self._by_count(now, model, branches), self._absent_table()
        elif self._belongs_to_another(table, now, model, branches):
            place, ignored = self._by_count(now, model, branches), table
        elif table.index is not None:
            place = self._by_index(table)
        else:
            place = self._by_value(table, now, model)
        run = self._run
        if place is None:
            run = self._start(None if ignored is not None else table, now, ignored)
        else:
            run.move(place)
        run.timestep = now
        if run.table is not None:
            run.table = table
            self._sends_rows = self._sends_rows is not False and now.matches(
                table.rows[min(run.place, len(table.rows) - 1)]
            )
        run.total = self._total(run, now)
        if (passes := self._passes_a_row(branches)) is not None:
            run.first_row[model] = passes
        number = run.passes[model]
        run.passes[model] += 1
        run.together |= len(run.passes) > 1
        self._forget(run.left())
        run.seen.add(run.place - run.first)
        branch = branches[number] if number < len(branches) else f"pass {number}"
        sigma = None if run.table is None or run.counted else run.table.sigma(run.place)
        return StepInfo(run.number, run.place - run.first, run.total, sigma, branch, run.call)

    def _foretold(self, timestep: torch.Tensor, table: Table | None) -> Timestep | None:
        """What is in a rounded copy of the table's next row, for which the host would wait in each step; None where the
        timestep has to be read.

        It is known where the pipeline's own call goes on, the scheduler has moved on by one row, and the model got just
        the rounded row before.
        """
        if table is None or timestep.is_inference() or place_in(table.tensor, timestep) is not None:
            return None
        if self._told_ahead is not None:
            told, version, now = self._told_ahead
            if told() is timestep and version == timestep._version:
                return now
        run = self._run
        if run is None or run.table is None or run.counted or table.index != run.place + 1:
            return None
        last = run.timestep
        if timestep.ndim > 1 or last.dtype != timestep.dtype or last != table.rounded(run.place, last.dtype):
            return None
        if not self._goes_on(run, table) or running_pipeline() is None:
            return None
        now = table.rounded(table.index, timestep.dtype)
        self._told_ahead = weakref.ref(timestep), timestep._version, now
        return now

    def notes(self) -> list[str]:
        """Where a run's count is not what its scheduler promised, for the runs of the last few calls."""
        return list(self.noted())

    def noted(self) -> dict[str, int]:
        """The same, each with the call of its run."""
        noted = {note: call for call, note in self._notes.values()}
        if self._run is not None and (last := self._note()):
            noted[last] = self._run.call
        return noted

    def forget_notes(self) -> None:
        """Say nothing more of the runs so far."""
        self._notes, self._told = {}, self._number - 1

    def _note(self) -> str:
        return self._run.note() if self._run is not None and self._run.number > self._told else ""

    # Each of these gives the place of the pass in the run that goes on, or None where another run starts.

    def _by_index(self, table: Table) -> int | None:
        run = self._run
        if run is None or not self._goes_on(run, table) or table.index < run.place:
            return None
        return table.index

    def _by_value(self, table: Table, now: Timestep, model: str) -> int | None:
        run = self._run
        if run is None or run.table is None or run.table.tensor is not table.tensor or run.table.index is not None:
            return None
        if run.table.scheduler is not table.scheduler:
            return None
        if now == run.timestep:
            # A value that the next row repeats: that row's turn comes after as many passes as a row has.
            full = run.passes[model] >= run.per_row.get(model, run.passes[model] + 1)
            repeats = not table.counts_itself and not run.counted and run.place + 1 in table.places(now)
            return run.place + 1 if full and repeats else run.place
        places = [] if run.counted or (now.low != now.high and table.counts_itself) else table.places(now)
        ahead = [place for place in places if place > run.place]
        if ahead:
            return ahead[0]
        if places and places[-1] < run.place:
            return None
        if places:
            return run.place
        # No row has such a timestep: each frame has its own, and no scheduler of the pipeline's moves.
        if run.place - run.first + 1 == run.total:
            return None  # the next window of a long video
        run.counted = True
        return run.place + 1

    def _by_count(self, now: Timestep, model: str, branches: tuple[str, ...]) -> int | None:
        run = self._run
        if run is None or run.table is not None:
            return None
        if now == run.timestep:
            # Nothing else tells a loop at one timestep (a profiler's, say) from ever more branches.
            return None if run.passes[model] >= self._full(run, model, branches) else run.place
        rises = (now.mean, now.high) > (run.timestep.mean, run.timestep.high)
        if run.rises is not None and rises != run.rises:
            return None
        run.rises = rises
        return run.place + 1

    def _goes_on(self, run: _Run, table: Table) -> bool:
        """Whether a table in which the scheduler is on its way is that of the run."""
        if run.table is None or run.table.scheduler is not table.scheduler:
            return False
        # A copy with the same rows, moved to another device perhaps. A new run would have no index yet.
        return run.table.tensor is table.tensor or (run.table.index is not None and run.table.rows == table.rows)

    def _belongs_to_another(self, table: Table, now: Timestep, model: str, branches: tuple[str, ...]) -> bool:
        """Whether the scheduler stands in the middle of a run that was broken off, and this pass is of another.

        That is what two pipelines with one transformer and a scheduler each look like.
        """
        run = self._run
        if table.index is None or run is None:
            return False
        former = run.ignored or run.table
        stands = former is not None and former.tensor is table.tensor and former.index == table.index
        if run.ignored is not None and stands:
            return True
        if self._sends_rows and not now.matches(table.rows[table.index]):
            return True
        return stands and now != run.timestep and run.passes[model] >= self._full(run, model, branches)

    def _full(self, run: _Run, model: str, branches: tuple[str, ...]) -> int:
        """Passes of a model that a row surely has no more than."""
        return max(len(branches), run.per_row.get(model, 0))

    def _passes_a_row(self, branches: tuple[str, ...]) -> int | None:
        """The passes of a model in a row, as far as the pipeline says whether it guides."""
        guided = getattr(self._pipe(), "do_classifier_free_guidance", None)
        if len(branches) == 1:
            return 1
        return None if len(branches) > 2 or not isinstance(guided, bool) else 1 + guided

    def _absent_table(self) -> Table | None:
        """A stand-in that says a pipeline's scheduler is not the one that runs."""
        scheduler = self.scheduler
        return None if scheduler is None else Table(scheduler, torch.empty(0), (), None)

    def _start(self, table: Table | None, now: Timestep, ignored: Table | None) -> _Run:
        note = self._note()
        if note:
            if self._logs:
                logger.warning("%s", note)
            self._notes[self._run.number] = self._run.call, note
        number, self._number = self._number, self._number + 1
        self._call += self._new_call
        self._new_call = not self._in_call
        self._notes = {run: told for run, told in self._notes.items() if told[0] > self._call - KEPT_RUNS}
        place = 0
        if table is not None:
            place = next(p for p in (table.index, table.begin, table.start(now)) if p is not None)
        self._run = _Run(number, self._call, table, place, place, now, ignored)
        return self._run

    def _total(self, run: _Run, now: Timestep) -> int | None:
        if run.table is None:
            return None
        if run.counted or (now.per_frame and run.table.index is None):
            told = getattr(self._pipe(), "num_timesteps", None)  # what the pipeline's own loop will do
            if isinstance(told, int) and told > 0 and (run.counted or told != len(run.table.rows)):
                return told
            if run.counted:
                return None
        rows = None if self._walked is None else run.table.rows_in(self._walked)
        # A loop that goes on behind the last row with noise has that one, too.
        return max(run.table.steps if rows is None else rows, run.place + 1) - run.first
