"""`accelerate`: sparse attention in a diffusers pipeline, removable without a trace."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ...attention import SLA, DenseSchedule, Method, RunReport, SparseAttention, resolve_method
from ...attention.backends import check_backend, special_refusal
from ...attention.meter import check_rows
from ...attention.records import dropped_note
from .clock import StepClock
from .copies import CopiedNotPickled
from .families import Family, find_transformers
from .rank_heads import balance_note
from .rebinding import SparseProcessor, rebind
from .scheduler_table import MAX_FLOW_SIGMA, highest_sigma
from .site import Site
from .sla import Learned, LearnedAtWork, find_learned, method_of
from .sla_weights import PROJECTION
from .ulysses import Ulysses

logger = logging.getLogger(__name__)

COPY = "copy the pipeline, or call vidaccel.restore() with the copy and accelerate it again where it is used."


class Handle:
    """Sparse attention at work in a pipeline. Made by `accelerate`; a context manager that removes itself."""

    def __init__(
        self,
        pipe: object,
        method: Method | str,
        backend: str,
        schedule: DenseSchedule | None,
        measure_error: int = 0,
        adapters: Sequence[str | Path] = (),
        base: str | Path | None = None,
        precision: str | None = None,
    ) -> None:
        transformers = find_transformers(pipe)
        method, learned = _with_learned(method, transformers, adapters, base)
        self.method = method
        for transformer, _ in transformers.values():
            reason = special_refusal(backend, _place_of(transformer), precision, method.second_stage)
            if reason is not None:
                raise RuntimeError(reason)
        schedule = schedule if schedule is not None else method.schedule
        if not hasattr(pipe, "scheduler"):
            fix = "pass schedule=DenseSchedule(first_steps=...) with a whole number."
            _check_without_scheduler(f"{type(pipe).__name__} is no pipeline, so", schedule, fix)
        elif schedule.needs_sigma:
            check_noise_levels(pipe.scheduler, schedule)
        self._pipe = pipe
        self._told: set[str] = set()
        self._clock = StepClock(pipe)
        self._installed: list[_Installed] = []
        try:
            for name, (transformer, family) in transformers.items():
                options = {"schedule": schedule, "backend": backend, "measure_error": measure_error}
                options["precision"] = precision
                own = learned.get(name)
                self._installed.append(_Installed(pipe, name, transformer, family, method, own, self._clock, **options))
        except BaseException:
            self.remove()  # the first of two transformers must not stay patched when the second cannot be
            raise

    def report(self) -> RunReport:
        """What was done since `accelerate` or `reset`: per layer, step and branch."""
        for installed in self._installed:
            installed.check_sites()
        engines = [installed.engine for installed in self._installed]
        reports = [engine.report() for engine in engines]
        records = sorted((r for report in reports for r in report.records), key=lambda r: (r.run, r.step))
        notes = dict.fromkeys(note for engine in engines for note in engine.notes)
        notes |= dict.fromkeys([*self._clock.notes(), *self._replaced(), *balance_note(records)])
        notes |= dict.fromkeys(dropped_note(max(engine.oldest_run for engine in engines)))
        return replace(reports[0], records=tuple(records), notes=tuple(notes))

    def reset(self) -> None:
        """Forget all records and everything the method remembers."""
        self._clock.forget_notes()
        for installed in self._installed:
            installed.engine.reset()

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

    def _replaced(self) -> list[str]:
        """What to say of transformers that the pipeline had when it was accelerated and has no more; logged once."""
        components = getattr(self._pipe, "components", None) or {}
        notes = [
            f"{i.name} was replaced after accelerate, and the new one runs dense: remove() this handle and accelerate "
            "again"
            for i in self._installed
            if i.active and i.name in components and not _contains(components[i.name], i.transformer)
        ]
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                logger.warning(note)
        return notes

    def remove(self) -> None:
        """Put every original processor back. A second call does nothing."""
        try:
            self._replaced()  # who never asks for a report hears of it here at the latest
        finally:
            for installed in self._installed:
                installed.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = ", ".join(f"{i.name} ({i.family.name})" for i in self._installed if i.active) or "removed"
        return f"<vidaccel {self.method.name} on {state}>"


def accelerate(
    pipe: Any,
    method: Method | str,
    *,
    backend: str = "auto",
    schedule: DenseSchedule | None = None,
    measure_error: int = 0,
    adapter: str | Path | Sequence[str | Path] = (),
    base: str | Path | None = None,
    precision: str | None = None,
) -> Handle:
    """Give the self-attention layers of a pipeline a sparse-attention method.

    Cross-attention stays as it is, and so do the weights. Works before or after LoRA loading, offloading, and
    `enable_parallelism` with a `ulysses_degree`; under `compile_repeated_blocks(fullgraph=True)` and beside diffusers'
    caches.

    Args:
        pipe: a diffusers pipeline whose transformers are all of a known family (`FAMILIES`), or such a transformer
            alone, whose steps are then counted from its timesteps.
        method: a config such as `SVG2(top_p=0.9)`, or a name for its defaults; "sla" for what the model was trained
            with.
        backend: a backend's name, which then runs or raises, or "auto".
        schedule: the steps and layers that stay dense; the method's own when None.
        measure_error: so many queries of each sparse call are computed densely too, in float32, and the report tells
            how far the method's output is from that, by layer and step: 64 are enough. The video stays the same to the
            bit. It costs `measure_error / tokens` of a dense call in float32 and a read of all keys and values; 0
            measures nothing.
        adapter: file or folder of an adapter of the recipe `sla`, for the method "sla"; of a pipeline with two
            transformers, one for each.
        base: folder or hub id of the pipeline that the transformers are from, where they do not know themselves; only
            SLA asks.
        precision: "int8" computes Q K^T of the sparse calls in 8 bits, on the backend `triton`, without a gradient; see
            `sparse_attention`. `measure_error` shows what it costs. None: in the dtype of the model, as dense calls.

    Returns:
        A `Handle` with `report()`, `reset()` and `remove()`.

    Raises:
        TypeError: a transformer of the pipeline is not known; names the families and what a new one needs. Or a
            processor of it cannot be rebound; names it.
        ValueError: unknown method, backend or precision, or a `measure_error` below 0; a schedule that needs the number
            of steps, or noise levels, where they cannot be known. As an `SLAError`: a transformer that was not trained
            for SLA, or for other settings.
        RuntimeError: the pipeline is accelerated already, or runs under ring attention; a precision, or a second stage
            of Sparge, that neither this machine nor the named backend has. Later, in the first call: a gradient is
            needed, or the dtype is none of those that it is for.
    """
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    check_backend(backend)
    return Handle(pipe, method, backend, schedule, check_rows(measure_error), adapters, base, precision)


def restore(pipe: Any) -> None:
    """Undo `accelerate` where the handle is lost, as after running a notebook cell twice. Does nothing otherwise.

    Raises:
        TypeError: no transformer of the pipeline is known.
    """
    for transformer, _ in find_transformers(pipe).values():
        for hook in list(transformer._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None) or getattr(getattr(hook, "__wrapped__", None), "__self__", None)
            if isinstance(owner, _Installed):
                owner.remove()


def _with_learned(
    method: Method | str, transformers: dict[str, Any], adapters: Sequence[str | Path], base: str | Path | None
) -> tuple[Method, dict[str, Learned]]:
    """The method, and for SLA what each transformer learned; its name stands for the settings of the training."""
    if method != SLA.name and not isinstance(method, SLA):
        method = resolve_method(method)
        if adapters:
            raise ValueError(f'adapter is for the method "sla", not for {method.name}: leave it out.')
        return method, {}
    learned = find_learned(transformers, adapters, base)
    return method_of(learned, transformers) if isinstance(method, str) else method, learned


def _place_of(transformer: torch.nn.Module) -> torch.device:
    """Where a transformer will compute, as far as can be told: weights on the CPU may be moved or offloaded later."""
    place = next((p.device for p in transformer.parameters() if p.device.type != "meta"), torch.device("cpu"))
    present = torch.accelerator.current_accelerator(check_available=True)
    return place if place.type != "cpu" or present is None else torch.device(present.type)


def _contains(component: object, transformer: torch.nn.Module) -> bool:
    """Whether a component is a transformer, in whatever wrapper."""
    return isinstance(component, torch.nn.Module) and any(module is transformer for module in component.modules())


def _check_without_scheduler(what: str, schedule: DenseSchedule, fix: str) -> None:
    """Refuse a schedule that needs what only a scheduler tells.

    Args:
        what: why there is none, as the start of a clause.
        fix: what to do.
    """
    if schedule.needs_num_steps:
        raise ValueError(
            f"{schedule} counts in fractions of a run or from its end, but {what} the number of steps is unknown: {fix}"
        )
    if schedule.needs_sigma:
        raise ValueError(f"{schedule} goes by noise levels, but {what} they are unknown: {fix}")


def check_noise_levels(scheduler: object, schedule: DenseSchedule) -> None:
    """Refuse bounds on noise levels at once where the scheduler shows that its own are not a flow's, from 0 to 1.

    So do those of diffusion that have no `sigmas` at all, such as DDIM. What is not known yet is told in the first
    step: levels may come with the table of timesteps (`sigmas` is None until then), and people swap schedulers.
    """
    instead = "use first_steps and last_steps, or give the pipeline a scheduler for flow models first."
    if scheduler is not None and not hasattr(scheduler, "sigmas"):
        raise ValueError(f"{schedule} goes by noise levels, but {type(scheduler).__name__} has none: {instead}")
    # Schedulers that can do both hold the levels of diffusion until their timesteps are set.
    if getattr(getattr(scheduler, "config", None), "use_flow_sigmas", False):
        return
    highest = highest_sigma(scheduler)
    if highest is not None and highest > MAX_FLOW_SIGMA:
        raise ValueError(
            f"{schedule} goes by noise levels from 0 to 1, but those of {type(scheduler).__name__} reach "
            f"{highest:.3g}: {instead}"
        )


class _Installed(CopiedNotPickled):
    """The processors and the hooks in one transformer; `options` are those of its engine."""

    def __init__(
        self,
        pipe: Any,
        name: str,
        transformer: Any,
        family: Family,
        method: Method,
        learned: Learned | None,
        clock: StepClock,
        **options: Any,
    ) -> None:
        self._modules = family.modules(transformer)
        processors: dict[str, Any] = {path: module.processor for path, module in self._modules.items()}
        if any(isinstance(p, SparseProcessor) for p in processors.values()):
            raise RuntimeError(
                f"{name} is accelerated already: call remove() on the first handle, or vidaccel.restore(pipe), before "
                "accelerating again."
            )
        Ulysses.of(transformer, name)  # what cannot be is refused now, where parallelism came first
        self.name, self.transformer, self.family = name, transformer, family
        self.engine = SparseAttention(method, num_layers=len(processors), model=name, **options)
        self._signature = inspect.signature(type(transformer).forward)
        self._clock = clock
        self._passes = 0
        self._calls, self._most_calls = 0, 0  # of the sites: before this pass, and in the pass that had most
        self.paused = ""
        self._learned = LearnedAtWork(pipe, name, transformer, self._modules, learned, method, options["schedule"])
        try:
            self._install(processors)
        except BaseException:
            self._learned.remove()
            raise

    def _install(self, processors: dict[str, Any]) -> None:
        family, transformer = self.family, self.transformer
        own = {"own_samples": family.own_samples, "reads_prefix": family.reads_prefix}
        weights = {path: getattr(module, PROJECTION, None) for path, module in self._modules.items()}
        self._sites = {
            path: Site(self.engine, layer, weights=weights[path], **own) for layer, path in enumerate(processors)
        }
        self._originals = processors
        self._own = {path: rebind(processor, self._sites[path]) for path, processor in processors.items()}
        for path, module in self._modules.items():
            module.processor = self._own[path]
        # A torch hook, not a wrapped `forward`: offloading replaces `forward` before or after us, and removing ours
        # must not bring back the one from before that.
        self._hooks = [
            transformer.register_forward_pre_hook(self._enter, with_kwargs=True),
            transformer.register_forward_hook(self._leave),
        ]
        self._clock.forgets(self.name, self.engine.forget_run)
        self.active = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._clock.forgets(self.name, self.engine.forget_run)

    @torch.compiler.disable
    def _enter(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell the engine the grid and the step of this forward pass."""
        given = self._signature.bind(module, *args, **kwargs).arguments
        timestep, latents = given.get(self.family.timestep), given.get("hidden_states")
        empty = isinstance(latents, torch.Tensor) and latents.numel() == 0
        if timestep is None or empty or ("hidden_states" in self._signature.parameters and latents is None):
            shape = list(latents.shape) if isinstance(latents, torch.Tensor) else latents
            raise ValueError(
                f"{self.name} was called with {self.family.timestep}={timestep} and hidden_states of shape {shape}: "
                "sparse attention needs a timestep and a batch that is not empty."
            )
        if self._clock.lost_its_pipeline:
            _check_without_scheduler(f"{self.name} was copied without its pipeline, so", self.engine.schedule, COPY)
        if self._passes == 1:
            self.check_sites()
        self._passes += 1
        self._calls = sum(site.calls for site in self._sites.values())
        step = self._clock.observe(torch.as_tensor(timestep), self.name, self.family.branches)
        if step.run != self.engine.step.run:
            self._most_calls = 0
        found = self.family.layout(module, given)
        layouts, dense = ((), found) if isinstance(found, str) else (found, "")
        if dense:
            self.engine.note(f"all calls of a forward pass stay dense: {dense}", logging.WARNING)
        shared = Ulysses.of(self.transformer, self.name)
        if shared is not None and layouts:
            shared.check_tokens(layouts[0].tokens, self.name)
        if layouts and (remark := self._learned.remark(layouts[0].video_tokens)):
            self.engine.note(remark, logging.WARNING)
        self.engine.enter(step, *layouts)
        for site in self._sites.values():
            site.enter(trims=self.family.trims and not dense, dense=dense or self.paused, shared=shared)

    @torch.compiler.disable
    def _leave(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        """Note a dense step that was skipped; have the backward pass of this pass begin with its grid and step.

        Gradient checkpointing runs the layers again then, and the last forward pass may have been another: a second
        sample's, or a teacher's.
        """
        made = sum(site.calls for site in self._sites.values()) - self._calls
        self._most_calls = max(self._most_calls, made)
        if made < self._most_calls and self.engine.schedule.step_reason(self.engine.step):
            self.engine.note(
                "a cache skipped steps that the schedule keeps dense: put both to work by one preset (vidaccel.apply), "
                "which computes them",
                logging.WARNING,
            )
        self._clock.passed()
        if not torch.is_grad_enabled():
            return
        passes = [self.engine.pass_again(), *(site.pass_again() for site in self._sites.values())]

        def again(grad: torch.Tensor) -> None:
            for enter in passes:
                enter()

        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(again)

    def check_sites(self) -> None:
        """Note the layers that made no attention call of ours in the forward passes so far."""
        if not self._passes or not self.active:
            return
        replaced = [p for p, module in self._modules.items() if module.processor is not self._own[p]]
        silent = [p for p, site in self._sites.items() if not site.calls and p not in replaced]
        backends = {
            str(getattr(b, "value", b)) for p in self._own.values() if (b := getattr(p, "_attention_backend", None))
        }
        if backends:
            self.engine.note(f"dense calls go through the attention backend set in diffusers: {', '.join(backends)}")
        if replaced:
            self.engine.note(
                f"the attention processors of {_some(replaced)} were replaced after accelerate, and run dense: "
                "remove() this handle and accelerate again (after fuse_qkv_projections and the like)",
                logging.WARNING,
            )
        if silent:
            self.engine.note(
                f"{_some(silent)} made no attention call that sparse attention could take over, and ran as they are"
                + (f" ({self.family.name}: {self.family.stays_dense})" if self.family.stays_dense else ""),
                logging.WARNING,
            )

    def remove(self) -> None:
        if not self.active:
            return
        for path, module in self._modules.items():
            own, original = self._own[path], self._originals[path]
            if module.processor is own:
                vars(original).update(own.settings())  # those of enable_parallelism and set_attention_backend since
                module.processor = original
        for hook in self._hooks:
            hook.remove()
        self._learned.remove()
        self.engine.forget()
        self.active = False


def _some(paths: list[str]) -> str:
    """The first of some paths, and how many there are."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
