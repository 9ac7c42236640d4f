"""Pipelines with a forward pass for each branch of guidance: the second one is left out in some steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry, ModelHook

from ...attention import StepInfo
from ..acceleration.left_out import a_cache_left_it_out
from ..guidance_branches import TWO, are_of_one_video, check_outermost, latents_of, tensors_in, with_tensors
from ..hooks.beside_hooks import beside_hooks
from ..hooks.diffusers_hooks import GUIDANCE_CACHE_HOOK
from ..hooks.hooked import HandleOf
from .differences import Differences


class LeftOutPasses(ModelHook):
    """Makes a second pass, or what stands for it.

    Args:
        model: name of the component, for messages.
        function: of this package that puts it on, for messages.
        place: tells the step of a pass from its arguments.
        differences: of this transformer.
    """

    handle: HandleOf

    def __init__(
        self,
        model: str,
        function: str,
        place: Callable[[Any, tuple, dict[str, Any]], StepInfo],
        differences: Differences,
    ) -> None:
        super().__init__()
        self._function = function
        self._model, self._place, self._differences = model, place, differences
        # Of the first pass what it was given, what it gave, and whether it was computed.
        self._first: tuple[StepInfo, Any, Any, bool] | None = None
        self.left_out = False
        """Whether the last pass was."""
        self.made, self.extrapolated, self.skipped = 0, 0, 0
        """Second passes that were computed, that were extrapolated, and that a cache over steps left out."""
        self.unlike = 0
        """Passes outside of calls that came second in a step, and are of another video than the first."""
        self.steps = 0
        """First passes, of steps that are guided and of others."""

    def install(self, transformer: torch.nn.Module) -> None:
        """Put it on a transformer."""
        with beside_hooks(transformer):
            HookRegistry.check_if_exists_or_initialize(transformer).register_hook(self, GUIDANCE_CACHE_HOOK)

    def remove(self, transformer: torch.nn.Module) -> None:
        """Take it off."""
        with beside_hooks(transformer):
            HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(GUIDANCE_CACHE_HOOK, recurse=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        # diffusers puts it in by closures over the original, which the copy would compute with.
        raise TypeError(
            f"the {self._model} has a guidance cache, whose hook cannot be copied: call remove() on its handle (or "
            f"vidaccel.restore(pipe)) before copying, and {self._function} with the copy. A pipeline that shares the "
            "transformer, as of from_pipe, needs no copy and has it with it."
        )

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The pass, or what stands for it."""
        forward = self.fn_ref.original_forward
        if torch.is_grad_enabled():
            self.left_out = False
            return forward(*args, **kwargs)
        step = self._place(module, args, kwargs)  # first: a thread that it refuses must not touch another's pass
        self.left_out = False
        first, self._first = self._first, None  # an error leaves no half step behind
        if step.branch == TWO[0]:
            self.steps += 1
            made = forward(*args, **kwargs)
            self._first = (step, latents_of(args, kwargs), made, not a_cache_left_it_out(module))
            return made
        if first is None or step.branch != TWO[1] or (first[0].run, first[0].step) != (step.run, step.step):
            return forward(*args, **kwargs)
        check_outermost(module, GUIDANCE_CACHE_HOOK, self._model, self._function)
        if not are_of_one_video(first[1], latents_of(args, kwargs)):
            self.unlike += 1
            return forward(*args, **kwargs)
        return self._second(module, step, *first[2:], lambda: forward(*args, **kwargs))

    def _second(
        self, module: torch.nn.Module, step: StepInfo, first: Any, computed: bool, make: Callable[[], Any]
    ) -> Any:
        tensors = tensors_in(first)
        if not self._differences.wanted(step, [x.shape for x in tensors], computed):
            self.left_out = True
            self.extrapolated += 1
            return with_tensors(first, self._differences.second(step, tensors))
        made = make()
        if a_cache_left_it_out(module):
            self.skipped += 1
        else:
            self.made += 1
        if computed:
            self._differences.add(step, tensors, tensors_in(made))
        return made
