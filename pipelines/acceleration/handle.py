"""`accelerate`: sparse attention in a diffusers pipeline, removable without a trace."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...attention import SLA, DenseSchedule, Method, RunReport
from ...attention.account.meter import check_rows
from ...attention.account.records import dropped_note
from ...attention.backends import check_backend
from ..hooks.removed import refuse_removed
from ..hooks.replaced import Replaced
from ..trained_for import origins_of
from .call_marks import CallMarks, remove_call_marks
from .checks import check_runs, check_schedule
from .choice import choose
from .clock import StepClock
from .families import find_transformers
from .installed import Installed, Unasked
from .loop_end import LoopEnd, loops_of, remove_loop_ends
from .rank_heads import balance_note

logger = logging.getLogger(__name__)


class Handle:
    """Sparse attention at work in a pipeline. Made by `accelerate`; a context manager that removes itself."""

    def __init__(
        self,
        pipe: object,
        method: Method | str | None,
        backend: str,
        schedule: DenseSchedule | None,
        min_tokens: int | None = None,
        measure_error: int = 0,
        adapters: Sequence[str | Path] = (),
        base: str | Path | None = None,
        precision: str | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        transformers = find_transformers(pipe)
        origins = origins_of(transformers, base)
        choice = choose(method, origins, adapters, settings)
        self.method = chosen = choice.method
        unasked = Unasked(method is None, schedule is None and not isinstance(method, Method))
        schedule = schedule if schedule is not None else chosen.schedule
        check_schedule(schedule, pipe)
        for transformer, _ in transformers.values():
            check_runs(transformer, chosen, backend, precision)
        least = _least_tokens(min_tokens, method, chosen)
        self._why = "; ".join(filter(None, ["" if method is not None else _why_chosen(chosen, least), choice.why]))
        if self._why:
            logger.info(self._why)
        self._warnings = choice.warnings
        for warning in self._warnings:
            logger.warning(warning)
        self._replacements = Replaced(pipe, "accelerate", "runs dense", "accelerate again")
        self._clock = StepClock(pipe)
        self._installed: list[Installed] = []
        self._loop_ends: list[LoopEnd | CallMarks] = []
        try:
            for name, (_, family) in transformers.items():
                options: dict[str, Any] = {"schedule": schedule, "backend": backend, "measure_error": measure_error}
                options |= {"precision": precision, "min_tokens": least, "unasked": unasked}
                given = (chosen, choice.learned.get(name), self._clock)
                self._installed.append(Installed(pipe, origins[name], family, *given, **options))
            self._loop_ends = [CallMarks(pipe, self._clock)]
            self._loop_ends += [LoopEnd(loop, self._clock) for loop in loops_of(pipe)]
        except BaseException:
            self.remove()  # the first of two transformers must not stay patched when the second cannot be
            raise

    def report(self) -> RunReport:
        """What was done since `accelerate` or `reset`: per layer, step and branch."""
        for installed in self._installed:
            installed.check_sites()
        engines = [installed.engine for installed in self._installed]
        reports = [engine.report() for engine in engines]
        oldest = max(engine.oldest_run for engine in engines)  # of one that made no pass since, older ones are there
        records = [r for report in reports for r in report.records if r.run >= oldest]
        records.sort(key=lambda r: (r.run, r.step))
        notes = dict.fromkeys(filter(None, [self._why, *self._warnings]))
        noted: dict[str, int] = {}
        for told in (*(engine.noted for engine in engines), self._clock.noted()):
            noted |= {note: max(call, noted.get(note, call)) for note, call in told.items()}
        notes |= dict.fromkeys([*noted, *self._replaced(), *balance_note(records)])
        notes |= dict.fromkeys(dropped_note(oldest, "calls"))
        return replace(reports[0], records=tuple(records), notes=tuple(notes), noted=noted)

    def reset(self) -> None:
        """Forget all records and everything the method remembers."""
        self._clock.forget_notes()
        for installed in self._installed:
            installed.engine.reset()

    def begin_anew(self, turn: int = 0) -> None:
        """Forget all records and what the method remembers of the last run: a step of a training must not depend on
        those before it, which a resumed one has not seen.

        Args:
            turn: with which methods begin whose plans differ from step to step, such as LVSA's.
        """
        self._clock.forget_notes()
        for installed in self._installed:
            installed.engine.begin_anew(turn)

    @contextlib.contextmanager
    def dense(self) -> Iterator[None]:
        """All calls stay dense inside the block, as if nothing were accelerated."""
        before = [installed.paused for installed in self._installed]
        for installed in self._installed:
            installed.paused = "dense()"
        try:
            yield
        finally:
            for installed, reason in zip(self._installed, before, strict=True):
                installed.paused = reason

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """Inside the block no call stays dense for the schedule, so that one step compiles what sparse ones need; but
        SLA has the schedule that it was trained with."""
        engines = [i.engine for i in self._installed if i.engine.method.name != SLA.name]
        before = [engine.schedule for engine in engines]
        for engine in engines:
            engine.schedule = DenseSchedule()
        try:
            yield
        finally:
            for engine, schedule in zip(engines, before, strict=True):
                engine.schedule = schedule

    def _replaced(self) -> list[str]:
        """What to say of transformers that the pipeline had when it was accelerated and has no more; logged once."""
        return self._replacements.notes({i.name: i.transformer for i in self._installed if i.active})

    def remove(self) -> None:
        """Put every original processor back. A second call does nothing."""
        try:
            self._replaced()  # who never asks for a report hears of it here at the latest
        finally:
            for installed in self._installed:
                installed.remove()
            for end in self._loop_ends:
                end.remove()

    def __enter__(self) -> Handle:
        refuse_removed(any(installed.active for installed in self._installed), "vidaccel.accelerate")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = ", ".join(f"{i.name} ({i.family.name})" for i in self._installed if i.active) or "removed"
        return f"<vidaccel {self.method.name} on {state}>"


def accelerate(
    pipe: Any,
    method: Method | str | None = None,
    *,
    backend: str = "auto",
    schedule: DenseSchedule | None = None,
    min_tokens: int | None = None,
    measure_error: int = 0,
    adapter: str | Path | Sequence[str | Path] = (),
    base: str | Path | None = None,
    precision: str | None = None,
    **settings: Any,
) -> Handle:
    """Give the self-attention layers of a pipeline a sparse-attention method.

    Cross-attention stays as it is, and so do the weights. Works before or after LoRA loading, offloading, and
    `enable_parallelism` with a `ulysses_degree`; under `compile_repeated_blocks(fullgraph=True)` and beside diffusers'
    caches.

    Args:
        pipe: a diffusers pipeline whose transformers are all of a known family (`FAMILIES`), or such a transformer
            alone, whose steps are then counted from its timesteps.
        method: a config such as `SVG2(top_p=0.9)`, or a name for its defaults; "sla" and "vsa" for what the model was
            trained with. None chooses: that of these for which the model was trained, otherwise `Tangent`; the report
            says which. A video that this choice cannot do stays dense, and the report says why.
        settings: of a method that is named, beside its defaults: `accelerate(pipe, "tangent", density=0.3)`.
        backend: a backend's name, which then runs or raises, or "auto".
        schedule: the steps and layers that stay dense; the method's own when None, under which a call of the
            transformer outside a run, whose number of steps is unknown, stays dense.
        min_tokens: videos of fewer tokens stay dense, where planning would cost more than it saves. None, where the
            method is chosen here, takes what `vidaccel break-even` measured on this machine, otherwise 8192, and the
            report says which; with a method, none.
        measure_error: so many queries of each sparse call are computed densely too, in float32, and the report tells
            how far the method's output is from that, by layer and step: 64 are enough. For VSA, that is with its coarse
            branch; what SLA learned counts as a difference, and the report says that it is no measure of quality. The
            video stays the same to the bit. It costs `measure_error / tokens` of a dense call in float32 and a read of
            all keys and values; 0 measures nothing.
        adapter: file or folder of an adapter of the recipe `sla`, for the method "sla"; of a pipeline with two
            transformers, one for each. Its LoRA counts beside those that are loaded later. Take these out by
            `delete_adapters`: `unload_lora_weights` takes out all, and the next pass is refused.
        base: folder or hub id ("owner/name", or "owner/name@revision") of the pipeline that the transformers are from,
            where they do not know themselves; only SLA and VSA ask.
        precision: "int8" computes Q K^T of the sparse calls in 8 bits, on the backend `triton`, without a gradient; see
            `sparse_attention`. `measure_error` shows what it costs. None: in the dtype of the model, as dense calls.

    Returns:
        A `Handle` with `report()`, `reset()` and `remove()`.

    Raises:
        TypeError: a transformer of the pipeline is not known; names the families and what a new one needs. Or a
            processor of it cannot be rebound; names it. Or what is given is no method, or no schedule, or a setting
            that the method has not; names those that it has.
        ValueError: unknown method, backend or precision, or a `measure_error` or `min_tokens` below 0; a schedule that
            needs the number of steps, or noise levels, where they cannot be known. As an `SLAError` or a `VSAError`: a
            transformer that was not trained for SLA or VSA, or for other settings, or whose LoRAs are disabled where an
            adapter brings another.
        RuntimeError: the pipeline is accelerated already, or runs under ring attention; a backend that cannot run here,
            or with "auto" none that is faster than dense attention; a precision, or a second stage of Sparge, that
            neither this machine nor the named backend has. Later, in the first call: a gradient is needed, or the dtype
            or size of heads is none of those that a named backend is for. A `ValueError` in any call, as an `SLAError`:
            the LoRA of an adapter was unloaded or switched off.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    check_backend(backend)
    rows = check_rows(measure_error)
    return Handle(pipe, method, backend, schedule, min_tokens, rows, adapters, base, precision, settings)


def restore(pipe: Any) -> None:
    """Undo `accelerate` where the handle is lost, as after running a notebook cell twice. Does nothing otherwise.

    Raises:
        TypeError: no transformer of the pipeline is known.
    """
    for transformer, _ in find_transformers(pipe).values():
        for hook in list(transformer._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None) or getattr(getattr(hook, "__wrapped__", None), "__self__", None)
            if isinstance(owner, Installed):
                owner.remove()
    remove_loop_ends(pipe)
    remove_call_marks(pipe)


def _least_tokens(asked: int | None, method: Method | str | None, chosen: Method) -> int | None:
    """The tokens below which a video stays dense, None for what was measured on the machine; a model that was trained
    for its attention has it at any length."""
    if asked is None:
        return None if method is None and not chosen.needs_weights else 0
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 0:
        raise ValueError(f"min_tokens is {asked!r}: it must be a whole number of tokens, 0 or more (0 for any length).")
    return asked


def _why_chosen(method: Method, least: int | None) -> str:
    if method.needs_weights:
        return f"no method was given: {method.name}, which the model was trained for"
    return f"no method was given: {method.name}" + ("" if least is None else f", from {least:,} tokens up")
