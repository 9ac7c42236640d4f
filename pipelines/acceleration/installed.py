"""Sparse attention at work in one transformer: its processors, and the hooks that tell it each forward pass."""

from __future__ import annotations

import inspect
import logging
import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ...attention import Method, SparseAttention, StepInfo, VideoLayout
from ...attention.gradients import may_have_gradients
from ...attention.methods.base import OutOfReach
from ..break_even import Key, Limit, fixed, limit
from ..few_steps.samplers import has_few_steps
from ..trained_for import Origin
from .checks import check_without_scheduler
from .clock import StepClock
from .copies import CopiedNotPickled
from .families import Family
from .left_out import layers_may_be_left_out, pass_was_left_out
from .rebinding import SparseProcessor, rebind
from .site import Site
from .sla import Learned, LearnedAtWork
from .sla_weights import PROJECTION
from .ulysses import Ulysses
from .vsa_gates import GatesAtWork

RUNNING = (
    "where another thread makes a video with it, wait for that one, or give each thread a pipeline with a copy of the "
    "transformer: restore would end the sparse attention of its run."
)
COPY = "copy the pipeline, or call vidaccel.restore() with the copy and accelerate it again where it is used."


@dataclass(frozen=True)
class Unasked:
    """What a handle chose itself. What was asked for is refused where it cannot be; the rest leaves a pass dense.

    Args:
        method: nobody named one. schedule: nobody gave one; it is a method's default.
    """

    method: bool = False
    schedule: bool = False


class Installed(CopiedNotPickled):
    """The processors and the hooks in one transformer.

    Args:
        pipe, origin, family: where it is, and of which kind.
        method: what makes it sparse. learned: what the transformer learned of it, as SLA.
        clock: of the pipeline.
        min_tokens: videos of fewer tokens stay dense; None goes by what was measured on the machine.
        unasked: what stays dense where it cannot be followed, because nobody asked for it.
        options: those of its engine.
    """

    def __init__(
        self,
        pipe: Any,
        origin: Origin,
        family: Family,
        method: Method,
        learned: Learned | None,
        clock: StepClock,
        min_tokens: int | None = 0,
        unasked: Unasked = Unasked(),
        **options: Any,
    ) -> None:
        name, transformer = origin.name, origin.transformer
        self._modules = family.modules(transformer)
        processors: dict[str, Any] = {path: module.processor for path, module in self._modules.items()}
        if any(isinstance(p, SparseProcessor) for p in processors.values()):
            raise RuntimeError(
                f"{name} is accelerated already: call remove() on the first handle, or vidaccel.restore(pipe), before "
                f"accelerating again; {RUNNING}"
            )
        Ulysses.of(transformer, name)  # what cannot be is refused now, where parallelism came first
        self.name, self.transformer, self.family = name, transformer, family
        self.engine = SparseAttention(
            method, num_layers=len(processors), depths=family.depths(transformer), model=name, **options
        )
        self._signature = inspect.signature(type(transformer).forward)
        self._clock, self._min_tokens, self._unasked = clock, min_tokens, unasked
        self._limits: dict[tuple[torch.device, torch.dtype], Limit] = {}  # of this run, where no number was given
        self._beyond: dict[tuple[int, int, int], str] = {}  # grids that the method cannot do, with the first text
        self._passes = 0
        self._calls, self._most_calls = 0, 0  # of the sites: before this pass, and in the pass that had most
        self.paused = ""
        self._thread: int | None = None  # which is in a forward pass
        self._inside = False  # of one that has not ended well
        self._gates = GatesAtWork(origin, self._modules, method)
        self._learned = LearnedAtWork(pipe, name, transformer, self._modules, learned, method, options["schedule"])
        try:
            self._install(processors)
        except BaseException:
            self._learned.remove()
            self._gates.remove()
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
            transformer.register_forward_hook(self._outside, always_call=True),
        ]
        self._clock.forgets(self.name, self.engine.forget_run)
        self.active = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._clock.forgets(self.name, self.engine.forget_run)

    @torch.compiler.disable
    def _enter(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell the engine the grid and the step of this forward pass."""
        self._clock.enter(module, self.name)
        self._thread, self._inside = threading.get_ident(), True
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
            check_without_scheduler(f"{self.name} was copied without its pipeline, so", self.engine.schedule, COPY)
        self._calls = sum(site.calls for site in self._sites.values())
        step = self._clock.observe(torch.as_tensor(timestep), self.name, self.family.branches)
        if self._passes == 1 or step.run != self.engine.step.run:
            self.check_sites(step)
        if step.run != self.engine.step.run:
            self._most_calls = 0
            self._limits = {}  # what was measured since the last run counts
        found = self.family.layouts_of(module, given)
        layouts, unknown = ((), found) if isinstance(found, str) else (found, "")
        dense = unknown or self._too_short(layouts, given, step)
        why = dense
        if not dense:
            dense, why = self._distilled() or self._uncounted(step) or self._out_of_reach(layouts) or ("", "")
        if dense:
            self.engine.note(f"all calls of a forward pass stay dense: {why}", logging.WARNING, step)
        dense = dense or self.paused
        shared = Ulysses.of(self.transformer, self.name)
        if shared is not None and layouts:
            shared.check_tokens(layouts[0].tokens, self.name)
        if layouts and (remark := self._learned.remark(layouts[0].video_tokens)):
            self.engine.note(remark, logging.WARNING, step)
        self.engine.enter(step, *layouts, dense=bool(dense), frozen=not may_have_gradients(module, given))
        for site in self._sites.values():
            site.enter(trims=self.family.trims and not unknown, dense=dense, shared=shared)

    def _too_short(self, layouts: tuple[VideoLayout, ...], given: dict[str, Any], step: StepInfo) -> str:
        """Why a video stays dense for its length; empty where it may be sparse."""
        tokens, least = layouts[0].video_tokens, self._min_tokens
        if least is None:
            found = self._limit(given)
            least = found.tokens
            self.engine.note(f"min_tokens {least}: {found.why}", step=step)
        return f"min_tokens {least}, above the video's {tokens} tokens" if tokens < least else ""

    def _distilled(self) -> tuple[str, str] | None:
        """The reason, short and whole, where nobody asked for a method in few steps, each of which has to be right."""
        scheduler = self._clock.scheduler
        if not self._unasked.method or self.engine.method.needs_weights or not has_few_steps(scheduler):
            return None
        return "distilled to few steps", (
            f"{type(scheduler).__name__} is of a model that was distilled to few steps, trained with attention to all, "
            "and each step counts: name a method to have them sparse"
        )

    def _uncounted(self, step: StepInfo) -> tuple[str, str] | None:
        """The reason, short and whole, where a schedule that nobody asked for counts steps of a number not known."""
        schedule = self.engine.schedule
        if not self._unasked.schedule or step.num_steps is not None or not schedule.needs_num_steps:
            return None
        return "number of steps unknown", (
            f"first_steps={schedule.first_steps} of the method's default schedule is a fraction of a run, and "
            f"{self.name} was called outside one of the accelerated pipeline: give accelerate a DenseSchedule with a "
            "whole number of first_steps to have such calls sparse"
        )

    def _out_of_reach(self, layouts: tuple[VideoLayout, ...]) -> tuple[str, str] | None:
        """The reason, short and whole, where a method that nobody asked for cannot do what it is set to."""
        if not self._unasked.method:
            return None
        try:
            for layout in dict.fromkeys(layouts):
                self.engine.method.check(layout)
        except OutOfReach as error:
            name, why = self.engine.method.name, str(error).rstrip(".")
            if error.field == "density" and error.least is not None and error.least < 1:
                # At the least density nothing of the video would be read: the same share of the rest is worth a try.
                enough = math.ceil(100 * (1 - (1 - error.least) * (1 - error.value))) / 100
                if enough < 1:
                    instead = f'accelerate(pipe, "{name}", density={enough:g})'
                    why += f". {instead} computes {error.value:g} of all other pairs"
                else:
                    why += ". So little is left to leave out that sparse attention has nothing to gain here"
            # Not once more for each length of text, which many prompts would fill the report with.
            return f"{name} cannot do this video", self._beyond.setdefault(layout.grid, why)
        return None

    def _limit(self, given: dict[str, Any]) -> Limit:
        """From how many tokens the method pays where and in the dtype in which the latents of a forward pass come."""
        latents = next((x for x in tree_leaves(given) if isinstance(x, torch.Tensor) and x.is_floating_point()), None)
        if latents is None:
            return fixed()
        place = latents.device, latents.dtype
        if place not in self._limits:
            heads = self.family.heads(self.transformer.config)
            self._limits[place] = limit(Key.here(*heads, *place, self.engine.method.name))
        return self._limits[place]

    @torch.compiler.disable
    def _leave(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        """Note a dense step that was skipped; have the backward pass of this pass begin with its grid and step.

        Gradient checkpointing runs the layers again then, and the last forward pass may have been another: a second
        sample's, or a teacher's.
        """
        self._inside = False
        self._passes += 1  # whole ones: of one that an error ended, not all layers were called
        made = sum(site.calls for site in self._sites.values()) - self._calls
        self._most_calls = max(self._most_calls, made)
        step = self.engine.step
        kept = not self._uncounted(step) and bool(self.engine.schedule.step_reason(step))
        # Fewer calls alone may be guidance, which leaves layers out on purpose.
        if made < self._most_calls and kept and (pass_was_left_out(module) or layers_may_be_left_out(module)):
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

    @torch.compiler.disable
    def _outside(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        """A forward pass ended, also by an error; what is remembered would be in the way of another attempt then."""
        if self._thread == threading.get_ident():
            self._thread = None
            if self._inside:
                self._clock.stopped()
                self._clock.call_ended()
            self._inside = False

    def check_sites(self, step: StepInfo | None = None) -> None:
        """Note the layers that made no attention call of ours in the forward passes so far.

        Args:
            step: of the pass that begins; None for that which was entered last.
        """
        if not self._passes or not self.active:
            return
        replaced = [p for p, module in self._modules.items() if module.processor is not self._own[p]]
        silent = [p for p, site in self._sites.items() if not site.calls and p not in replaced]
        backends = {
            str(getattr(b, "value", b)) for p in self._own.values() if (b := getattr(p, "_attention_backend", None))
        }
        if backends:
            self.engine.note(
                f"dense calls go through the attention backend set in diffusers: {', '.join(backends)}", step=step
            )
        if replaced:
            self.engine.note(
                f"the attention processors of {_some(replaced)} were replaced after accelerate, and run dense: "
                "remove() this handle and accelerate again (after fuse_qkv_projections and the like)",
                logging.WARNING,
                step,
            )
        if silent:
            self.engine.note(
                f"{_some(silent)} made no attention call that sparse attention could take over, and ran as they are"
                + (f" ({self.family.name}: {self.family.stays_dense})" if self.family.stays_dense else ""),
                logging.WARNING,
                step,
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
        self._gates.remove()
        self.engine.forget()
        self.active = False


def _some(paths: list[str]) -> str:
    """The first of some paths, and how many there are."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
