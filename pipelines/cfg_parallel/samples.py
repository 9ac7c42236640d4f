"""Pipelines that have the branches of guidance in one batch: each process computes half of the samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..guidance_branches import latents_of, of_samples, samples_in, tensors_in, with_tensors
from ..hooks.hooked import HandleOf
from .pair import Pair
from .passes import CHECKED


class SplitBatch:
    """Halves the batch before a forward pass, and joins what the processes made of it after.

    A batch that cannot be halved, as without guidance, is computed by both. By torch's own hooks, the first of all
    before a pass, so that what else reads the arguments of a pass sees those of this process.

    Args:
        pair: the processes.
        model: name of the component, for messages.
        started: of the pipeline that runs, something that is another object in each run; None outside of runs.
    """

    handle: HandleOf
    alone = False
    """As of `SplitPasses`; pipelines that make a batch of both branches decide on guidance once a run."""

    def __init__(self, pair: Pair, model: str, started: Callable[[], object]) -> None:
        self._pair, self._model, self._started = pair, model, started
        self._halved = False
        self._run: object = None
        self._shape: torch.Size | None = None
        self._checks = 0  # of that run and shape
        self.computed, self.received = 0, 0
        """Samples of this process and of the other one."""
        self._hooks: list[RemovableHandle] = []

    def install(self, transformer: torch.nn.Module) -> None:
        """Put it on a transformer."""
        self._signature = inspect.signature(type(transformer).forward)
        self._hooks = [
            transformer.register_forward_pre_hook(self._halve, prepend=True, with_kwargs=True),
            transformer.register_forward_hook(self._join),
        ]

    def remove(self, transformer: torch.nn.Module) -> None:
        """Take it off the transformer."""
        for hook in self._hooks:
            hook.remove()

    @torch.compiler.disable
    def _halve(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        batch = samples_in(args, kwargs)
        self._halved = batch % 2 == 0 and not torch.is_grad_enabled()
        if not self._halved:
            self.computed += batch
            return args, kwargs
        latents = latents_of(args, kwargs)
        self._check_run(latents)
        self.computed += batch // 2
        self.received += batch // 2
        half = slice(self._pair.rank * batch // 2, (self._pair.rank + 1) * batch // 2)
        return of_samples(self._signature, module, args, kwargs, half)

    def _check_run(self, latents: torch.Tensor) -> None:
        """In the first two steps of a run, and of each size in it: both processes must be about the same videos."""
        run = self._started()
        if run is None or run is not self._run or latents.shape != self._shape:
            self._run, self._shape, self._checks = run, latents.shape, 0
        self._checks += 1
        if self._checks <= CHECKED:
            self._pair.check_alike(latents, self._model)

    @torch.compiler.disable
    def _join(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        if not self._halved:
            return None
        self._halved = False
        return with_tensors(output, [torch.cat(both) for both in self._pair.exchange(tensors_in(output))])
