"""`SparseAttention`: one method, one schedule and one backend at work in one model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from .account.meter import added_in, check_rows, relative_error, sample_rows
from .account.notes import Notes
from .account.pending import KeptRecords, Pending
from .account.records import RunReport, call_of, dropped_note
from .account.timing import Span
from .backends import (
    BACKENDS,
    WORTHWHILE,
    check_backend,
    precision_of,
    runs_somehow,
)
from .backends.base import AS_INPUTS
from .call_checks import CallChecks
from .functional import attend, check_inputs, check_tensors, choose_backend
from .gradients import normal_tensors, wants_gradient
from .groups import dense_attention
from .heads import ALL_HEADS, HeadShare
from .layout import VideoLayout
from .memory import EngineMemory, kept_layouts
from .methods import Method, resolve_method
from .pass_plans import PassPlans
from .plan import BlockPlan
from .schedule import DenseSchedule, StepInfo, check_kind

logger = logging.getLogger(__name__)


DenseAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class SparseAttention:
    """Sparse self-attention for the layers of one model.

    The model's side calls `enter` once per forward pass, then the engine once per layer. State (centroids, static
    masks) is kept per layer, guidance branch, layout and batch, and what depends on a run is emptied when a run starts,
    or where `forget_run` says that it ended. No more is kept than that of the layouts (sizes of videos) that were used
    last (`memory.KEPT_LAYOUTS`), and the records and notes of the last runs (`first_kept`).

    Args:
        method: a `Method` or the name of one.
        num_layers: transformer blocks of the model.
        depths: the block that each of them counts as in the schedule, where that is not its own number: blocks beside
            the main ones count as those that they feed.
        schedule: the steps and layers that stay dense; the method's own when None.
        backend: a backend's name, which then runs or raises, or "auto".
        model: name of the component, for the report.
        measure_error: queries of each sparse call whose dense attention is computed too, to tell the true error of the
            method's output; 0 measures nothing. The output stays the same to the bit.
        precision: "int8" computes Q K^T of the sparse calls in 8 bits, see `sparse_attention`; None, in the dtype of
            the model. Dense calls keep that.

    Raises:
        ValueError: unknown method, backend or precision; a `measure_error` below 0, or a `num_layers` below 1.
        TypeError: what is given is no method, or no schedule.
    """

    def __init__(
        self,
        method: Method | str,
        *,
        num_layers: int,
        schedule: DenseSchedule | None = None,
        backend: str = "auto",
        model: str = "transformer",
        measure_error: int = 0,
        precision: str | None = None,
        depths: Sequence[int] | None = None,
    ) -> None:
        self.method = resolve_method(method)
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_layers is {num_layers!r}: it must be a whole number of blocks, 1 or more.")
        self.num_layers = num_layers
        self._depths = depths
        self._blocks = num_layers if depths is None else max(depths, default=-1) + 1  # as the schedule counts them
        self.schedule = schedule if schedule is not None else self.method.schedule
        check_kind("schedule", self.schedule)
        self.backend = check_backend(backend)
        self.model = model
        self.measure_error = check_rows(measure_error)
        self.precision, self._formats = precision, precision_of(precision)
        self.step = StepInfo()
        self.layouts: tuple[VideoLayout, ...] = ()
        # The last ones that the method was found to be able to do, each with what it remarks of their grid.
        self._fitting: dict[VideoLayout, str] = {}
        self._checks = CallChecks(self.method, self.backend, self._formats)
        self._notes = Notes(model, logger)
        self._passes = PassPlans()
        self._frozen, self._entered_with_gradients = False, False
        self.reset()

    def reset(self) -> None:
        """Forget every plan, centroid and record."""
        self.forget()
        self._forget_records()

    def begin_anew(self, turn: int = 0) -> None:
        """As `reset`, as a run begins; but static masks stay, which depend on the layout alone.

        Args:
            turn: see `PlanMemory`.
        """
        self._forget_run()
        self._forget_records()
        self.memory.turn = turn

    def _forget_records(self) -> None:
        self._records = KeptRecords(self.model, self.method.name)
        self._notes.forget()

    def forget(self) -> None:
        """Forget every plan and centroid, which can be gigabytes on a large model; the records stay."""
        self.memory = EngineMemory()
        self._forget_run()

    def forget_run(self) -> None:
        """Forget what is of one run alone, at its end; plans that a backward pass needs stay."""
        self.memory.forget_run()
        self._checks.forget_run()

    def forget_branches(self, branches: Collection[str]) -> None:
        """Forget what is kept for some branches of the run, which will not come again or not soon."""
        self.memory.forget_branches(branches)

    def _forget_run(self) -> None:
        self.forget_run()
        self._passes.drop()

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts with a run, so without a memory.
        return {**self.__dict__, "memory": None, "_passes": PassPlans()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def enter(self, step: StepInfo, *layouts: VideoLayout, dense: bool = False, frozen: bool = False) -> None:
        """Say where the following calls are: once per forward pass of the model.

        Args:
            step: of the pass.
            layouts: of the sequence; or one for each sample of the batch, where their texts are not of one length. No
                layout says that the sequence is not known: then all calls stay dense.
            dense: every call of the pass will say that it must stay dense, so the method need not be able to do the
                layouts. Nor need it where the schedule leaves nothing sparse.
            frozen: nothing that the pass is made of wants a gradient, so no backward pass will come, even where torch
                would record it.

        Raises:
            ValueError: the method cannot do what it is set to on this layout.
        """
        if step.run != self.step.run:
            self._forget_run()
            self._notes.keep(self._records.begin(step))
        if step.run != self.step.run or step.num_steps != self.step.num_steps or layouts != self.layouts:
            self._warn_of_schedule(step)
        self._passes.drop()
        dense = dense or bool(self.schedule.nothing_sparse(step.num_steps, self._blocks))
        # Not another one for each length of text, which many prompts would fill the report with.
        remarks = {layout.grid: remark for layout, remark in self._fitting.items()}
        for layout in () if dense else dict.fromkeys(layouts):
            if layout not in self._fitting:
                self.method.check(layout)
            if layout.grid not in remarks:
                remarks[layout.grid] = self.method.remark(layout)
            self._fitting.pop(layout, None)
            self._fitting[layout] = remarks[layout.grid]
            if remarks[layout.grid]:
                self.note(remarks[layout.grid], step=step)
        # More than those of one pass: two prompts of unlike length come in turn.
        for old in list(self._fitting)[: -kept_layouts(len(layouts))]:
            del self._fitting[old]
        self.step, self.layouts = step, layouts
        self._frozen, self._entered_with_gradients = frozen, torch.is_grad_enabled() and not frozen

    @property
    def with_gradients(self) -> bool:
        """Whether the forward pass may have a backward pass.

        Reentrant gradient checkpointing switches gradients off around each layer, and runs it again with them: what
        counts is how the forward pass began.
        """
        return self._entered_with_gradients or (torch.is_grad_enabled() and not self._frozen)

    def pass_again(self) -> Callable[[], None]:
        """What brings the forward pass that was entered last back, with the plans that its gradients need.

        Gradient checkpointing runs layers again in the backward pass, when other forward passes may have come since.
        """
        entered, bring_back = (
            (self.step, self.layouts, self._frozen, self._entered_with_gradients),
            self._passes.again(),
        )

        def again() -> None:
            self.step, self.layouts, self._frozen, self._entered_with_gradients = entered
            bring_back()

        return again

    @property
    def layout(self) -> VideoLayout | None:
        """The layout of the first sample."""
        return self.layouts[0] if self.layouts else None

    def _warn_of_schedule(self, step: StepInfo) -> None:
        warning = self.schedule.warning(step.num_steps, self._blocks)
        if warning:
            self.note(warning, logging.WARNING, step)
        if remark := self.schedule.remark(step.num_steps):
            self.note(remark, step=step)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: int,
        *,
        dense: str = "",
        stock: DenseAttention = dense_attention,
        sample: int = 0,
        heads: HeadShare = ALL_HEADS,
        weights: Any = None,
        first: int = 0,
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            q: `[B, H, N, D]`, k, v: `[B, Hkv, N, D]`, after normalisation and rotary embedding; H is a multiple of Hkv,
                and query head h reads head `h // (H // Hkv)`.
            layer: block number, counted from 0; a model may have more calls than blocks.
            dense: why this call must stay dense, whatever the schedule says; empty if it need not.
            stock: what computes dense calls.
            sample: where samples have a layout each, the one that this call is of.
            heads: where several processes share the heads of the layer, which of them these are. All of these processes
                make the call.
            weights: what was trained for the method in this layer; see `Method.complete`.
            first: of the queries that are the model's. Those before it stand for keys that have no query; what is made
                of them is thrown away, and the report does not count them.

        Returns:
            `[B, H, N, D]`, like `q`.

        Raises:
            ValueError: q, k and v are empty or disagree in shape, dtype or device; NaN or infinity in q or k; a method
                that needs weights, and there are none; a layer below 0; a plan of somebody's own method that breaks a
                promise of `BlockPlan`. TypeError: it is none.
            RuntimeError: a named backend cannot run the call, or nothing can in the precision that was asked for.
        """
        check_tensors(q, k, v)
        if layer < 0:
            raise ValueError(f"layer is {layer}: blocks are counted from 0.")
        layout = self.layouts[sample] if self.layouts else None
        if not dense and layout is not None and q.shape[2] == layout.tokens:
            self.check_able(q, k, v)
        if layout is not None and q.shape[2] == layout.tokens != k.shape[2]:
            raise ValueError(
                f"self-attention needs q and k of one length, got q {tuple(q.shape)} and k {tuple(k.shape)} in layer "
                f"{layer}, for {layout}."
            )
        reason = dense or self.dense_reason(q.shape[2], q.device, layer, sample)
        if reason:
            with Span(q.device) as span:
                out = stock(q, k, v)
                if self.method.completes_dense and layout is not None and q.shape[2] == layout.tokens:
                    out = self._completed(out, q, k, v, None, layout, weights)
            self._records.add(Pending(self.step, layer, reason, "dense", None, None, span, {}))
            return out

        with Span(q.device) as plan_span, normal_tensors():
            self._checks.finite(q, k, layer, heads, self.step)
            plan = self._plan(q, k, v, layer, sample, heads)
            check_inputs(q, k, v, plan)
            chosen = choose_backend(q, k, v, plan, self.backend, precision=self._formats)
            chosen.prepare(q, k, v, plan, self._formats)
        with Span(q.device) as span:
            out, _ = attend(chosen, q, k, v, plan, q.shape[-1] ** -0.5, precision=self._formats)
            rows = self._measured_rows(q, layer, first)
            # A copy of them, since a method may complete an output in place.
            of_plan = None if rows is None or not self.method.completes_dense else out.detach().index_select(2, rows)
            out = self._completed(out, q, k, v, plan, layout, weights)
        pairs, details = plan.pairs(first), plan.details
        whole = (plan.n_q - first) * plan.n_kv
        counts = pairs.sum(), pairs.numel() * whole
        shares = heads.computed(pairs.expand(q.shape[:2]))
        if shares is not None:
            counts = shares.sum(), q.shape[0] * heads.total(q.shape[1]) * whole
            details = {**details, "rank_pairs": shares}
        if self._formats != AS_INPUTS:
            scales, kept = chosen.scales_of(q, plan, self._formats), str(q.dtype).removeprefix("torch.")
            told = f"precision {self.precision}: Q K^T of sparse calls in 8 bits, {scales}; dense calls keep {kept}"
            if details.get("error_is_measured"):
                details = {**details, "error_is_measured": False}  # that of the pairs alone is not the output's
                told += "; what 8 bits add to the error is beside the tolerance, and measure_error tells it"
            self.note(told)
        error = self._measured(out, of_plan, q, k, v, rows, heads)
        self._records.add(Pending(self.step, layer, "", chosen.name, counts, plan_span, span, details, *error))
        if self.backend == "auto":
            kind = "dense" if plan.is_dense else "scattered" if plan.is_scattered else "regular"
            place = q.device.type
            slow = not plan.is_dense and chosen.name not in WORTHWHILE.get(place, BACKENDS)
            unknown = place not in WORTHWHILE
            remark = ", which is slow there" if slow else ", which was never measured there" if unknown else ""
            self.note(
                f"backend auto: {chosen.name} for {kind} plans on {place}{remark}",
                logging.WARNING if remark else logging.INFO,
            )
        return out

    def check_able(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Refuse what the backend cannot compute, also where the schedule keeps a call dense: the first sparse step
        would come too late to tell. Calls that are dense for another reason need no backend.

        Args:
            q, k, v: see `__call__`.

        Raises:
            RuntimeError: see `__call__`.
        """
        self._checks.able(q, k, v)

    def _completed(self, out: torch.Tensor, q: torch.Tensor, *others: Any) -> torch.Tensor:
        """What `Method.complete` makes of an output; under autocast it keeps the dtypes that it computes in."""
        with torch.autocast(q.device.type, enabled=False):
            return self.method.complete(out, q, *others)

    def dense_reason(self, tokens: int, device: torch.device, layer: int, sample: int = 0) -> str:
        """Why the layer stays dense now, with a sequence of so many tokens; empty when it is sparse."""
        if not self.layouts:
            return "unknown layout"
        if tokens != self.layouts[sample].tokens:
            self.note(
                f"a call with {tokens} tokens does not fit the layout's {self.layouts[sample].tokens}: it stays dense",
                logging.WARNING,
            )
            return "unknown layout"
        depth = layer if self._depths is None else self._depths[layer]
        reason = self.schedule.dense_reason(self.step, depth, self._blocks)
        if not reason and self.backend == "auto" and not runs_somehow(device):
            self.note(f"no backend runs on {device.type}: all calls stay dense", logging.WARNING)
            return f"no backend on {device.type}"
        return reason

    def note(self, text: str, level: int = logging.INFO, step: StepInfo | None = None) -> None:
        """Log a choice (info) or a fallback (warning) once, and keep it for the report as long as records are kept.

        Args:
            text: what is true of the call. One that differs in its numbers alone is not logged again.
            level: see above.
            step: of the forward pass; None for that which was entered last.
        """
        self._notes.add(text, level, call_of(self.step if step is None else step))

    def report(self) -> RunReport:
        """Everything since the last `reset`, of the last few runs."""
        config = {f.name: getattr(self.method, f.name) for f in fields(self.method)} | {"schedule": self.schedule}
        config["backend"] = self.backend
        if self.measure_error:
            config["measure_error"] = self.measure_error
        if self.precision is not None:
            config["precision"] = self.precision
        notes = (*self.notes, *dropped_note(self.oldest_run))
        return RunReport(self.method.name, config, tuple(self._records.all()), notes, self.noted)

    @property
    def oldest_run(self) -> int:
        """Of which records are kept; above 0 where older ones were dropped."""
        return self._records.oldest_run

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noted, without what the report says of dropped records."""
        return tuple(self.noted)

    @property
    def noted(self) -> dict[str, int]:
        """The same, each with the last call that it was true of."""
        return self._notes.noted()

    def _plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, sample: int, heads: HeadShare
    ) -> BlockPlan:
        """The method's plan. With gradients, a second call in one forward pass gets the plan of the first."""
        key = (layer, sample, tuple(q.shape), k.shape[1])
        if (known := self._passes.plan(key)) is not None:
            return known
        layout = self.layouts[sample]
        # `EngineMemory` finds the calls of a branch by the second part of this.
        call = (layer, self.step.branch, sample, tuple(q.shape[:2]), k.shape[1])
        memory = self.memory.of(call, (layout, q.device), heads, len(self.layouts))
        checkpointed = self._entered_with_gradients and not torch.is_grad_enabled()
        if checkpointed or wants_gradient(q, k, v):
            # The last call of a training was of another sample, whose clusters say nothing of this one.
            memory = replace(memory, call={}, counts=self._passes.counts(key, memory.counts))
        # Under autocast, products would lose the float32 that methods compute in.
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            plan = self.method.plan(q, k, v, layout, memory)
        self._checks.plan(plan, layout)
        if self.with_gradients or wants_gradient(q, k, v):
            self._passes.keep(key, plan if plan.coarse is None else replace(plan, coarse=None))
        return plan

    def _measured_rows(self, q: torch.Tensor, layer: int, first: int) -> torch.Tensor | None:
        """The queries whose error is measured, `[R]` int64, from the `first` on: others in each layer and step, the
        same for every method. None where none is."""
        if not self.measure_error:
            return None
        turn = self.step.step * self.num_layers + layer
        return first + sample_rows(q.shape[2] - first, self.measure_error, turn, q.device)

    def _measured(
        self,
        out: torch.Tensor,
        of_plan: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor | None,
        heads: HeadShare,
    ) -> tuple[torch.Tensor | None, Span | None]:
        """The true error of a call, which stays on its device until the report is asked for, and how long it took.

        Args:
            out: of the call.
            of_plan: `rows` of it, before the method completed it; None where what it adds is none of dense attention.
            rows: see `_measured_rows`.
        """
        if rows is None:
            return None, None
        if self.method.needs_weights and not self.method.completes_dense:
            self.note(
                f"the measured error of {self.method.name} is the distance from dense attention, which the model was "
                "not trained to be near to: it is no measure of quality",
                logging.WARNING,
            )
        with Span(q.device) as span, torch.autocast(q.device.type, enabled=False):
            beside = None if of_plan is None else added_in(out, of_plan, rows)
            error = relative_error(out, q, k, v, rows, heads, beside)
        return error, span
