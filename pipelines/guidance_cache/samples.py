"""Pipelines that have the branches of guidance in one batch: in some steps only its second half is computed.

That is the one with the prompt: all of them put the negative prompt first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ...attention import StepInfo
from ..guidance_branches import are_of_one_video, latents_of, of_samples, samples_in, tensors_in, with_tensors
from ..hooks.hooked import HandleOf
from .differences import Differences


class LeftOutSamples:
    """Takes the samples of the negative prompt out of the batch before a forward pass, and puts what stands for them
    into what it gives.

    By torch's own hooks, the first of all before a pass, so that what else reads its arguments sees what is computed.

    Args:
        place: tells the step of a pass from its arguments.
        branch: the pass of a step that has both branches in its batch.
        guided: whether the step that runs has them.
        differences: of this transformer.
    """

    handle: HandleOf

    def __init__(
        self,
        place: Callable[[Any, tuple, dict[str, Any]], StepInfo],
        branch: str,
        guided: Callable[[StepInfo], bool],
        differences: Differences,
    ) -> None:
        self._place, self._branch, self._guided, self._differences = place, branch, guided, differences
        self._step: StepInfo | None = None  # of the pass that runs, where it has both branches
        self._shapes: list[torch.Size] = []  # of what a branch gives
        self.left_out = False
        """Whether half of the last pass was."""
        self.made, self.extrapolated, self.skipped = 0, 0, 0
        """Halves that were computed, that were left out, and that a cache over steps left out, which is refused."""
        self.unlike = 0
        """Passes outside of calls whose halves are of two videos."""
        self.steps = 0
        """Passes of steps that are guided and of others."""
        self._hooks: list[RemovableHandle] = []

    def install(self, transformer: torch.nn.Module) -> None:
        """Put it on a transformer."""
        self._signature = inspect.signature(type(transformer).forward)
        self._hooks = [
            transformer.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            transformer.register_forward_hook(self._leave),
        ]

    def remove(self, transformer: torch.nn.Module) -> None:
        """Take it off the transformer."""
        for hook in self._hooks:
            hook.remove()

    @torch.compiler.disable
    def _enter(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # First: a thread that it refuses must not touch another's pass.
        step = None if torch.is_grad_enabled() else self._place(module, args, kwargs)
        self._step, self.left_out = None, False
        if step is None:
            return args, kwargs
        batch = samples_in(args, kwargs)
        self.steps += step.branch == self._branch
        if step.branch != self._branch or batch % 2 or not self._guided(step):
            return args, kwargs
        latents = latents_of(args, kwargs)
        if not are_of_one_video(latents[: batch // 2], latents[batch // 2 :]):
            self.unlike += 1
            return args, kwargs
        self._step = step
        # What shapes a batch of another size gives is not known before it was computed.
        known = self._shapes if self._shapes and self._shapes[0][0] == batch // 2 else []
        if self._differences.wanted(step, known):
            return args, kwargs
        self.left_out = True
        return of_samples(self._signature, module, args, kwargs, slice(batch // 2, batch))

    @torch.compiler.disable
    def _leave(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        if self._step is None:
            return None
        step, self._step = self._step, None
        tensors = tensors_in(output)
        if self.left_out:
            self.extrapolated += 1
            stand_ins = self._differences.second(step, tensors)
            return with_tensors(output, [torch.cat(both) for both in zip(stand_ins, tensors, strict=True)])
        self.made += 1
        negative, positive = zip(*[x.chunk(2) for x in tensors], strict=True)
        self._shapes = [x.shape for x in positive]
        self._differences.add(step, positive, negative)
        return None
