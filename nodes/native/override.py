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

from ...attention import DenseSchedule, Method, SparseAttention, StepInfo, VideoLayout
from ...attention.account.meter import check_rows
from ...attention.account.timing import Span
from ...attention.backends import check_backend
from ...attention.methods.base import OutOfReach
from ..report.run_log import RunLog
from ..report.wording import limit_words, said_by, video_words
from .calls import ForwardPass, unfit_reason
from .gates import Gates
from .geometry import Inputs, StaysDense, unwrap
from .limits import Least, too_short
from .models import find_geometry, why_dense
from .passes import Passes
from .sampling import DensePart, branches_of, replaced_blocks, step_of, window_of

KEY = "vidaccel_sparse_attention"
OVERRIDE = "optimized_attention_override"
KEPT_LAYOUTS = 4  # whose engines stay alive for the samplings to come

Attention = Callable[..., torch.Tensor]


class NativeAttention(RunLog):
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
        super().__init__(name, settings)
        self.method_for = method_for
        self.dense, self.least, self.backend = dense, Least(min_tokens, by_length), check_backend(backend)
        self.measure_error, self.precision, self.weights = check_rows(measure_error), precision, weights or {}
        self.gates = Gates(gates, KEY) if gates else None
        self._models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # that are sampled with; empty for any
        self._says_index = False  # which saves a compiled model new functions in each pass
        self._branches: dict[Any, str] = {}
        self._levels: list[float] = []
        self._table: tuple[torch.Tensor, list[float]] | None = None
        self._override: tuple[Attention | None, bool, Attention] | None = None
        self._lock = threading.Lock()  # ComfyUI runs the branches on several GPUs from a thread each

    # -- what the sampler calls ----------------------------------------------------------------------------------------

    def begin(self, queued: str | None = None, model: torch.nn.Module | None = None) -> None:
        """A sampler starts.

        Args:
            queued: which entry of ComfyUI's queue it belongs to. What was done for an earlier one is no news any more,
                reported or not: it may have been interrupted. None where nobody says.
            model: ComfyUI's BaseModel that it samples with; one for each GPU that shares the work. None for any.
        """
        self.count(queued)
        if model is not None:
            self._models.add(model)
        self._forget()
        self.least.forget()

    def end(self) -> None:
        """A sampler ends, also by an interruption: records stay, centroids (gigabytes, maybe) go."""
        self._models.clear()
        self._forget()
        if self.gates is not None:
            self.gates.release()

    def _forget(self) -> None:
        self._branches, self._levels, self._table = {}, [], None
        self._passes = Passes()
        self._passing_step = -1
        # Branches in context windows, and of further passes: of that step, and of the one before.
        self._passing: set[str] = set()
        self._passing_before: set[str] = set()
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
            given = (name for name, value in conditions.items() if value is not None)
            beside = self._passes.beside(options, sigma, given)
            branches = branches_of(options, self._branches, beside)
            self._pass_on(step.step, branches if beside or window_of(options) else [])
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

    def _pass_on(self, step: int, branches: list[str]) -> None:
        """Forget the context windows and further passes that the step before did not have: where windows move, few come
        again, and all of a sampling's would be many times the memory of one step's.

        Args:
            step: that runs. branches: of such a pass, none of others: guidance may leave these out in some steps.
        """
        if step != self._passing_step:
            for engine in self._engines.values():
                engine.forget_branches(self._passing_before - self._passing)
            self._passing_step, self._passing_before, self._passing = step, self._passing, set()
        self._passing.update(branches)

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

    def method_on(self, layout: VideoLayout) -> Method:
        """The method for a layout.

        Raises:
            ValueError: it cannot do what it is set to there, in the words of its node.
        """
        with said_by(self.title):
            try:
                method = self.method_for(layout)
                method.check(layout)
            except OutOfReach as error:
                raise ValueError(limit_words(error, layout, self.settings)) from error
        return method

    def _new_engine(self, current: ForwardPass) -> SparseAttention:
        method = self.method_on(current.layout)
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


def _apart(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, N, H * D]` as `[B, H, N, D]`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _together(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, D]` as `[B, N, H * D]`."""
    return x.transpose(1, 2).flatten(2)
