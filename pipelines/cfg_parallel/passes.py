"""Pipelines with a forward pass for each branch of guidance: each process computes one of the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch.utils._pytree import tree_leaves, tree_map

from ..guidance_branches import check_outermost, latents_of, tensors_in, with_tensors
from ..hooks.beside_hooks import beside_hooks
from ..hooks.diffusers_hooks import hooks_of
from ..hooks.hooked import HandleOf
from .pair import Pair

NAME = "vidaccel_cfg_parallel"
CHECKED = 2
"""Steps of a run in which the latents of both processes are compared."""


class SplitPasses(ModelHook):
    """A pass that is the other process's gives a tensor at once, which is filled in when both passes are over.

    Pipelines call the model for both branches and only then work on what it gave. (Until it is filled, it is NaN: who
    reads it early makes no video that looks right.) The first pair of passes of a new shape is computed by both, since
    what a model gives is learned there. A pass without guidance, after such with it in the run, is computed by both,
    and is that of the process that has the first branch, whose state is that of one process.

    Args:
        pair: the processes.
        model: name of the component, for messages.
        guided: whether the step that runs has two passes.
        started: of the pipeline that runs, something that is another object in each run.
    """

    handle: HandleOf

    def __init__(self, pair: Pair, model: str, guided: Callable[[], bool], started: Callable[[], object]) -> None:
        super().__init__()
        self._pair, self._model, self._guided, self._started = pair, model, guided, started
        self._shapes: dict[tuple, Any] = {}  # of a pass, see `_shape` -> what comes of it, on the device "meta"
        self._first: Any = None  # what the first pass of the step gave, once it was called
        self._timestep: object = None  # of that pass
        self._run: object = None
        self._checks = 0  # of that run
        self.computed, self.received = 0, 0
        """Passes of this process and of the other one."""
        self.waits = False
        """Whether the last pass was the other one's."""
        self.alone = False
        """Whether the pass that runs is without guidance, after such with it in the run."""

    def install(self, transformer: Any) -> None:
        """Put it on a transformer."""
        with beside_hooks(transformer):
            HookRegistry.check_if_exists_or_initialize(transformer).register_hook(self, NAME)

    def remove(self, transformer: Any) -> None:
        """Take it off the transformer."""
        with beside_hooks(transformer):
            HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(NAME, recurse=False)

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The pass, or what stands for it until the other process has made it."""
        check_outermost(module, NAME, self._model, "cfg_parallel")
        self.waits = False
        forward = self.fn_ref.original_forward
        if torch.is_grad_enabled() or not self._guided():
            self._first = None
            self.computed += 1
            if torch.is_grad_enabled() or self._run is None or self._started() is not self._run:
                return forward(*args, **kwargs)
            return self._alone(forward, args, kwargs)
        timestep = kwargs.get("timestep")
        second = self._first is not None and _same(timestep, self._timestep)
        first, self._first = self._first, None  # an error leaves no half step behind
        if not second:
            self._check_run(args, kwargs, alone=first is not None)
        shape = _shape(args, kwargs)
        known = self._shapes.get(shape)
        if known is None or second == bool(self._pair.rank):
            made = forward(*args, **kwargs)
            if known is None:
                self._shapes[shape] = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, made)
            self.computed += 1
        else:
            device = tensors_in((args, kwargs))[0].device
            made = tree_map(lambda x: _waiting(x, device) if isinstance(x, torch.Tensor) else x, known)
            self.received += 1
            self.waits = True
        if second:
            self._fill(first, made)
        else:
            self._first, self._timestep = made, timestep
        return made

    def _alone(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A pass without guidance in a run that had it; what it makes is the first process's in both."""
        self.alone = True
        try:
            made = forward(*args, **kwargs)
        finally:
            self.alone = False
        return with_tensors(made, [both[0] for both in self._pair.exchange(tensors_in(made))])

    def _fill(self, first: Any, second: Any) -> None:
        """Have each process's pass in both processes."""
        passes = [tensors_in(made) for made in (first, second)]
        other = 1 - self._pair.rank
        for both, x in zip(self._pair.exchange(passes[self._pair.rank]), passes[other], strict=True):
            x.copy_(both[other])

    def _check_run(self, args: tuple, kwargs: dict[str, Any], alone: bool) -> None:
        """In the first two steps of a run: both processes must be about the same video, of which the second tells the
        scale of guidance and the scheduler. In it, no step may have had one pass `alone`."""
        run = self._started()
        if run is not self._run:
            self._run, self._checks = run, 0
        elif alone:
            raise RuntimeError(
                f"a step called {self._model} once, where two branches of guidance were to come: its pipeline "
                "cannot be shared by cfg_parallel."
            )
        self._checks += 1
        if self._checks > CHECKED:
            return
        latents = latents_of(args, kwargs)
        if isinstance(latents, torch.Tensor):
            self._pair.check_alike(latents, self._model)


def pass_is_of_another(transformer: Any) -> bool:
    """Whether the last pass of a transformer was made by another process."""
    hook = hooks_of(transformer).get(NAME)
    return isinstance(hook, SplitPasses) and hook.waits


def _waiting(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    x = torch.empty(like.shape, dtype=like.dtype, device=device)
    return x.fill_(torch.nan) if x.is_floating_point() else x.zero_()


def _same(timestep: Any, other: Any) -> bool:
    """Whether two passes are of one step; values, for which a GPU is waited for, are read of two tensors alone."""
    if not isinstance(timestep, torch.Tensor) or not isinstance(other, torch.Tensor):
        return timestep is other or bool(timestep == other)
    if timestep.shape != other.shape:
        return False
    return timestep.data_ptr() == other.data_ptr() or torch.equal(timestep, other)


def _shape(args: tuple, kwargs: dict[str, Any]) -> tuple:
    """What the shapes and dtypes of a model's output follow from."""
    device = tensors_in((args, kwargs))[0].device.type
    found: list[Any] = [torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)]
    for x in tree_leaves((args, kwargs)):
        found.append((*x.shape, x.dtype) if isinstance(x, torch.Tensor) else isinstance(x, bool) and x)
    return tuple(found)
