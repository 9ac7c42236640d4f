"""Sparse attention in ComfyUI's native models: the attention override and the wrapper that tells it where it is.

`patch.sparsify` gives a clone of a MODEL one APPLY_MODEL wrapper. In each forward pass that wrapper works out the token
grid, the step and the guidance branches, and puts an attention override into a copy of `transformer_options`, in front
of the one that was there. The override takes the self-attention calls over the video. Every other call
(cross-attention, text refiners, calls with a mask) and every call that stays dense goes to the former override, or to
ComfyUI's own function, untouched. Nothing is patched on a module or a class, and the original MODEL stays as it is.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..attention import CallRecord, DenseSchedule, Method, RunReport, SparseAttention, StepInfo, VideoLayout
from ..attention.backends import check_backend
from ..attention.meter import check_rows
from ..attention.methods.base import OutOfReach
from ..attention.records import KEPT_RUNS
from ..attention.timing import Span
from .calls import ForwardPass, unfit_reason
from .gates import Gates
from .geometry import Inputs, StaysDense, unwrap
from .limits import Least, too_short
from .native_models import find_geometry, why_dense
from .news import CACHED, NEVER, News, nothing
from .sampling import DensePart, branches_of, replaced_blocks, step_of, window_of
from .wording import limit_words, said_by, video_words

logger = logging.getLogger(__name__)

KEY = "vidaccel_sparse_attention"
OVERRIDE = "optimized_attention_override"
KEPT_LAYOUTS = 4  # whose engines stay alive for the samplings to come
DROPPED = f"records of earlier samplings were dropped: those of the last {KEPT_RUNS} are kept"

Attention = Callable[..., torch.Tensor]


class NativeAttention:
    """Sparse attention at work in one patched MODEL: its state and its report.

    State belongs to this object, is kept per layer, guidance branch and layout, and is emptied when a sampler starts
    and when it ends (finished or interrupted).

    Args:
        method_for: layout -> the method to use on it.
        name: of the method.
        settings: what the report shows as its settings.
        dense: steps and layers that stay dense.
        min_tokens: videos with fewer tokens stay dense.
        by_length: the method whose break-even on this machine counts where `min_tokens` is its default; "" for none.
        backend: a backend's name, which then runs or raises, or "auto".
        measure_error, precision: see `SparseAttention`.
        weights: what was trained for the method in each layer, as the method is given it.
        gates: likewise, where that is made of what the layer is given.

    Raises:
        ValueError: unknown backend, or a negative `min_tokens` or `measure_error`.
    """

    def __init__(
        self,
        method_for: Callable[[VideoLayout], Method],
        *,
        name: str,
        settings: dict[str, Any],
        dense: DensePart,
        min_tokens: int = 0,
        by_length: str = "",
        backend: str = "auto",
        measure_error: int = 0,
        precision: str | None = None,
        weights: Mapping[int, torch.nn.Module] | None = None,
        gates: Mapping[int, torch.nn.Module] | None = None,
    ) -> None:
        self.method_for, self.name, self.settings = method_for, name, settings
        self.dense, self.least, self.backend = dense, Least(min_tokens, by_length), check_backend(backend)
        self.measure_error, self.precision, self.weights = check_rows(measure_error), precision, weights or {}
        self.gates = Gates(gates, KEY) if gates else None
        self._engines: dict[VideoLayout, SparseAttention] = {}  # the one used last is the last
        self._used: dict[VideoLayout, int] = {}  # -> the last run that used its engine
        self._dense_calls: list[tuple[list[CallRecord], Span]] = []
        self._notes: dict[str, int] = {}  # -> the last run that it was true of
        self._told: dict[str, int] = {}  # likewise, of what is no fallback
        self._models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # that are sampled with; empty for any
        self._says_index = False  # which saves a compiled model new functions in each pass
        self._branches: dict[Any, str] = {}
        self._levels: list[float] = []
        self._table: tuple[torch.Tensor, list[float]] | None = None
        self._override: tuple[Attention | None, bool, Attention] | None = None
        self._lock = threading.Lock()  # ComfyUI runs the branches on several GPUs from a thread each
        self._run = -1
        self._first = 0  # of the runs of the queue's last entry
        self._reported = -1  # the last run that a report has shown
        self._queued: str | None = None

    # -- what the sampler calls ----------------------------------------------------------------------------------------

    def begin(self, queued: str | None = None, model: torch.nn.Module | None = None) -> None:
        """A sampler starts.

        Args:
            queued: which entry of ComfyUI's queue it belongs to. What was done for an earlier one is no news any more,
                reported or not: it may have been interrupted. None where nobody says.
            model: ComfyUI's BaseModel that it samples with; one for each GPU that shares the work. None for any.
        """
        self._run += 1
        if model is not None:
            self._models.add(model)
        if queued != self._queued:
            self._queued, self._first = queued, self._run
        self._forget()
        self.least.forget()
        self._dense_calls = [c for c in self._dense_calls if c[0][0].run > self._run - KEPT_RUNS]

    def end(self) -> None:
        """A sampler ends, also by an interruption: records stay, centroids (gigabytes, maybe) go."""
        self._models.clear()
        self._forget()
        if self.gates is not None:
            self.gates.release()

    def _forget(self) -> None:
        self._branches, self._levels, self._table = {}, [], None
        self._window_step = -1
        # Branches in context windows: of that step, and of the one before.
        self._windows: set[str] = set()
        self._windows_before: set[str] = set()
        for engine in self._engines.values():
            engine.forget()

    def forward(
        self,
        executor: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None = None,
        c_crossattn: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **conditions: Any,
    ) -> torch.Tensor:
        """One forward pass: the APPLY_MODEL wrapper. `executor.class_obj` is ComfyUI's BaseModel.

        Raises:
            ValueError: the method cannot do what it is set to on this video.
        """
        if self._models and executor.class_obj not in self._models:
            # A guider with two models has the wrappers of the first around both.
            self.note("the second model of the guider has not been through this node, and stayed dense.")
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conditions)
        options = dict(transformer_options or {})
        # Not those of another forward pass: a model that does not set them must not seem to.
        for name in ("block_index", "block_type"):
            options.pop(name, None)
        current = self._enter(executor.class_obj, x, t, c_crossattn, options, conditions)
        options[KEY] = current
        if replaced_blocks(options) and (current.extra_calls or not self._says_index):
            options["patches_replace"] = current.told_of_replaced(options["patches_replace"])
        options[OVERRIDE] = self._override_before(options.get(OVERRIDE))
        out = self._run_pass(executor, x, t, c_concat, c_crossattn, control, options, **conditions)
        if isinstance(out, torch.Tensor) and out.requires_grad:
            out.register_hook(lambda grad: current.run_again())
        self._says_index |= current.says_index
        # A cache of another node may skip the whole model: then there was no call at all.
        if current.layout is not None and current.offered and not current.calls:
            self.note(
                f"no attention call of the model had the {current.layout.tokens} tokens of "
                f"{video_words(current.layout)}, so all stayed dense. Another node may compute self-attention itself, "
                "or this version of the model adds tokens that are not known here.",
                logging.WARNING,
            )
        return out

    def _run_pass(self, executor: Any, *args: Any, **conditions: Any) -> Any:
        """The pass itself, in which gates see what their layers are given; also in its backward pass, where it has
        one."""
        if self.gates is None:
            return executor(*args, **conditions)
        model = unwrap(executor.class_obj.diffusion_model)
        self.gates.watch(model)
        again = False
        try:
            out = executor(*args, **conditions)
            again = isinstance(out, torch.Tensor) and out.requires_grad
        finally:
            if not again:
                self.gates.release(model)
        return out

    def _enter(
        self,
        base: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor | None,
        options: dict[str, Any],
        conditions: dict[str, Any],
    ) -> ForwardPass:
        if self._run < 0:
            self.begin()  # a sampler that calls nobody when it starts
        sigma = options.get("sigmas", t)
        sigma = float(torch.as_tensor(sigma).max())
        levels = self._levels_of(options.get("sample_sigmas"))
        step = self._step(sigma, levels)
        with self._lock:
            branches = branches_of(options, self._branches)
            if window_of(options):
                self._in_window(step.step, branches)
        model = unwrap(base.diffusion_model)
        geometry = find_geometry(model)
        current = ForwardPass(step, branches, x.shape[0], None, "", geometry)
        if geometry is None:
            self.note(why_dense(model), logging.WARNING)
            return current
        inputs = Inputs.of(model, x, text, conditions)
        try:
            layout = geometry.layout(inputs)
        except StaysDense as reason:
            lost = "" if self.gates is None else f", without the gates that {self.name} was trained with"
            self.note(f"{reason}, so all stayed dense{lost}.", logging.WARNING)
            return current
        current.layout = layout
        current.offsets, current.main_layers = geometry.block_offsets(model), geometry.main_layers(model)
        current.extra_calls, current.silent = geometry.extra_calls(inputs), frozenset(geometry.silent(options))
        current.layers, current.by_length = geometry.layers(model), self.least.needs_heads
        current.reason = "" if current.by_length else too_short(self.least.min_tokens, layout)
        if not current.reason:
            current.reason = self.dense.step_reason(sigma, base.model_sampling.percent_to_sigma, levels)
            if not current.by_length:
                self._engine(current)
        return current

    def _levels_of(self, table: torch.Tensor | None) -> list[float]:
        """The noise levels of a sampling, read once, since the host waits for a GPU that has them."""
        if table is None:
            return []
        if self._table is None or self._table[0] is not table:
            self._table = (table, table.tolist())
        return self._table[1]

    def _in_window(self, step: int, branches: list[str]) -> None:
        """Forget the context windows that the step before did not have: where they move, few come again, and all of a
        sampling's would be many times the memory of one step's.
        """
        if step != self._window_step:
            for engine in self._engines.values():
                engine.forget_branches(self._windows_before - self._windows)
            self._window_step, self._windows_before, self._windows = step, self._windows, set()
        self._windows.update(branches)

    def _step(self, sigma: float, levels: list[float]) -> StepInfo:
        if len(levels) > 1:
            step, count = step_of(sigma, levels)
            return StepInfo(self._run, step, count, sigma)
        if not self._levels or sigma != self._levels[-1]:
            self._levels.append(sigma)
        return StepInfo(self._run, len(self._levels) - 1, None, sigma)

    def _engine(self, current: ForwardPass) -> SparseAttention:
        """The engine of a pass: a new one asks the method whether it can do the layout."""
        layout = current.layout
        with self._lock:
            engine = self._engines.pop(layout, None) or self._new_engine(current)
            self._engines[layout] = engine  # now the last one
            self._used[layout] = self._run
        return engine

    def _new_engine(self, current: ForwardPass) -> SparseAttention:
        layout = current.layout
        with said_by(self.title):
            try:
                method = self.method_for(layout)
                method.check(layout)
            except OutOfReach as error:
                raise ValueError(limit_words(error, layout, self.settings)) from error
        # Never one of this sampling, which may have many: a prompt of another length is another layout in some models.
        idle = [known for known in self._engines if self._used[known] != self._run]
        for known in idle[: max(0, len(self._engines) + 1 - KEPT_LAYOUTS)]:
            del self._engines[known], self._used[known]
        return SparseAttention(
            method,
            num_layers=current.layers,
            schedule=DenseSchedule(),  # which calls stay dense is decided here, so that they stay ComfyUI's own
            backend=self.backend,
            model=current.geometry.family,
            measure_error=self.measure_error,
            precision=self.precision,
        )

    # -- what the model calls ------------------------------------------------------------------------------------------

    def _override_before(self, former: Attention | None) -> Attention:
        """The override, in front of a former one. The same function in every step: torch.compile guards on it."""
        compiling = "torch._dynamo" in sys.modules
        if self._override is None or self._override[:2] != (former, compiling):

            def override(func, q, k, v, heads, *args, **kwargs):
                inner = func if former is None else lambda *a, **kw: former(func, *a, **kw)
                current = (kwargs.get("transformer_options") or {}).get(KEY)
                return self._attend(current, inner, q, k, v, heads, args, kwargs)

            # A compiled model must not trace into a choice by data. Without dynamo there is nothing to keep out, and
            # importing it takes seconds.
            made = torch.compiler.disable(override) if compiling else override
            self._override = (former, compiling, made)
        return self._override[2]

    def _attend(
        self,
        current: ForwardPass | None,
        inner: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """One attention call of the model, in either of ComfyUI's tensor layouts.

        Args:
            current: the forward pass, None outside of one.
            inner: what computes a call that is not taken: `(q, k, v, heads, ...) -> out`.
            q, k, v: `[B, N, H * D]`, or `[B, H, N, D]` with `skip_reshape=True`.
            heads: H.
            args, kwargs: the other arguments of the call, `mask` first.

        Returns:
            `[B, N, H * D]`, or `[B, H, N, D]` with `skip_output_reshape=True`.
        """
        if current is not None:
            current.offered += 1
        split = kwargs.get("skip_reshape", False)
        length = 2 if split else 1
        if (
            current is None
            or current.layout is None
            or len(args) > 1  # a calling convention that is not known
            or q.shape[0] != current.batch
            or not q.shape[length] == k.shape[length] == v.shape[length] == current.layout.tokens
        ):
            return inner(q, k, v, heads, *args, **kwargs)

        options = kwargs.get("transformer_options") or {}
        layer = current.layer(options)
        if layer is None:
            where = "" if options.get("block_index") is None else f" in block {options['block_index']}"
            self.note(
                f"a further call{where} has the video's {current.layout.tokens} tokens, and no block of "
                f"{current.geometry.family} makes it: it stayed dense. It is another node's, such as NAG with as many "
                "text tokens.",
                logging.WARNING,
            )
            return inner(q, k, v, heads, *args, **kwargs)
        if current.by_length:
            current.by_length = False
            tokens, why = self.least.of(heads, q.shape[-1] // (1 if split else heads), q.device, q.dtype)
            if why:
                self.note(why)
            if short := too_short(tokens, current.layout):
                current.reason = short
            else:
                self._engine(current)
        given = None
        if self.gates is not None:
            with said_by(self.title):
                given = self.gates.take(current, layer)
        mask = args[0] if args else kwargs.get("mask")
        reason = current.reason or self.dense.layer_reason(layer) or unfit_reason(q, k, v, heads, split, mask, kwargs)
        joined = not kwargs.get("skip_output_reshape", False)  # in what is given back
        if reason:
            with Span(q.device) as span:
                out = inner(q, k, v, heads, *args, **kwargs)
                if given is not None:
                    tensors = [_apart(out, heads) if joined else out]
                    tensors += [x if split else _apart(x, heads) for x in (q, k, v)]
                    out = self.gates.complete(self.method_for(current.layout), current.layout, layer, given, *tensors)
                    out = _together(out) if joined else out
            self._record(current, layer, reason, span)
            return out
        q, k, v = (q, k, v) if split else (_apart(x, heads) for x in (q, k, v))
        out = self._sparse(current, layer, q, k, v, given)
        return _together(out) if joined else out

    def _sparse(
        self,
        current: ForwardPass,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        given: torch.Tensor | None,
    ) -> torch.Tensor:
        """Each guidance branch of the batch on its own, so that a batch of two gives what two calls give."""
        branches = current.branches if current.batch % len(current.branches) == 0 else ["batch"]
        parts = [x.chunk(len(branches)) for x in (q, k, v)]
        inputs = [None] * len(branches) if given is None else given.chunk(len(branches))
        outs = []
        for branch, one, *tensors in zip(branches, inputs, *parts, strict=True):
            one_q, one_k, one_v = tensors
            weights = self.weights.get(layer) if one is None else self.gates.of(layer, one, q.shape[1])
            with self._lock, said_by(self.title):
                engine = self._engines[current.layout]
                engine.enter(replace(current.step, branch=branch), current.layout)
                outs.append(engine(one_q, one_k, one_v, layer, weights=weights))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    @property
    def title(self) -> str:
        """Of the node, in errors and in the log."""
        return f"Sparse Attention ({self.name})"

    # -- what the report node calls ------------------------------------------------------------------------------------

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
        if any(not record.reason for record in records):  # an engine's notes are on its sparse calls
            for layout, engine in self._engines.items():  # the one used last is the last
                true_of |= dict.fromkeys(engine.notes, self._used[layout])
        notes = tuple(note for note in report.notes if true_of.get(note, -1) >= first)
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


def _apart(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, N, H * D]` as `[B, H, N, D]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _together(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, D]` as `[B, N, H * D]`."""
    return x.transpose(1, 2).flatten(2)
