"""`cfg_parallel`: a pipeline whose branches of guidance are computed by two processes, removable without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..acceleration.families import Family, find_transformers
from ..guidance_branches import TWO, StepIsGuided, check_not_compiled, guidance_of, other_branches
from ..guidance_cache.passes import LeftOutPasses
from ..guidance_cache.samples import LeftOutSamples
from ..hooks.diffusers_hooks import FORECAST_HOOK, hooks_of
from ..hooks.hooked import HookedPipeline, is_hooked
from ..hooks.running_pipeline import PipelineOfPass
from ..hooks.undo import CFG_PARALLEL
from .pair import Pair
from .passes import SplitPasses
from .samples import SplitBatch

READS_BETWEEN = (
    "Cosmos2VideoToWorldPipeline",
    "Cosmos2TextToImagePipeline",
    "Cosmos2_5_PredictBasePipeline",
    "Cosmos2_5_TransferPipeline",
    "Cosmos3OmniPipeline",
    "MotifVideoPipeline",
    "MotifVideoImage2VideoPipeline",
)
"""Pipelines of diffusers 0.42.1 that work on what the first pass of a step gave before they make the second."""


class CfgParallel(HookedPipeline[SplitPasses | SplitBatch]):
    """Guidance shared by two processes. Made by `cfg_parallel`; a context manager that removes itself."""

    attribute = CFG_PARALLEL
    function = "cfg_parallel"
    without = "is shared with no other process"

    def __init__(self, pipe: Any, group: dist.ProcessGroup | None) -> None:
        kind = type(pipe).__name__
        if hasattr(pipe, CFG_PARALLEL):
            raise RuntimeError(f"this {kind} is cfg-parallel already: call remove() on the first handle.")
        transformers = find_transformers(pipe)
        tells = guidance_of(pipe) is not None
        for name, (transformer, family) in transformers.items():
            if why := unshared_guidance(type(pipe), family, tells):
                raise TypeError(f"{why}. Share the sequence instead (Ulysses).")
            if is_hooked(transformer, SplitPasses, SplitBatch):
                raise RuntimeError(
                    f"the {name} of this {kind} is cfg-parallel already, with another pipeline that shares it: this "
                    "one is so with it, or call remove() on its handle, or vidaccel.restore(pipe), first."
                )
            if is_hooked(transformer, LeftOutPasses, LeftOutSamples):
                raise RuntimeError(
                    f"the {name} of this {kind} has a guidance cache, and in steps without a second pass the other "
                    "process would have nothing to do: call remove() on its handle, or do without cfg_parallel."
                )
            check_not_compiled(pipe, name, transformer, "what is exchanged cannot be")
        pair = Pair(group)
        self.rank = pair.rank
        """The branch that this process computes: 0 the first one of a step, 1 the second."""
        hooked: dict[str, tuple[torch.nn.Module, SplitPasses | SplitBatch]] = {}
        self._guided = guided = dict[str, StepIsGuided]()
        for name, (transformer, family) in transformers.items():
            hook: SplitPasses | SplitBatch
            guided[name], table = StepIsGuided(pipe), PipelineOfPass(pipe).table
            if family.branches == TWO:
                hook = SplitPasses(pair, name, guided[name], table)
            else:
                hook = SplitBatch(pair, name, table)
            hooked[name] = (transformer, hook)
        super().__init__(pipe, hooked)
        self._forecast(pair)

    def _forecast(self, pair: Pair | None) -> None:
        """Have forecast caches decide by both branches, of which each process computes one, and without guidance by the
        first; None for by their own."""

        def agree_for(hook: SplitPasses | SplitBatch, pair: Pair) -> Callable[[float, torch.device], float]:
            return lambda value, device: pair.agreed(value, device, first=hook.alone)

        for transformer, hook in self._hooked.values():
            forecast = hooks_of(transformer).get(FORECAST_HOOK)
            if forecast is not None:
                forecast.agree_by(None if pair is None else agree_for(hook, pair))

    def remove(self) -> None:
        """Put the pipeline back as it was. A second call does nothing."""
        if self._active:
            self._forecast(None)
        super().remove()

    def note(self) -> str:
        """What this process computed since the start, and what came from the other one."""
        parts = self._replaced()
        for name, (_, hook) in self._hooked.items():
            unit = "passes" if isinstance(hook, SplitPasses) else "samples"
            parts.append(f"{name}: {hook.computed} {unit} computed here, {hook.received} by the other process")
            parts += self._guided[name].notes(name)
        return "; ".join(parts)

    def __repr__(self) -> str:
        return f"<vidaccel cfg-parallel: {f'process {self.rank} of 2' if self._active else 'removed'}>"


def cfg_parallel(pipe: Any, group: dist.ProcessGroup | None = None) -> CfgParallel:
    """Have two processes compute a branch of classifier-free guidance each, nearly twice as fast where passes are most
    of a run; known as CFG parallelism (xDiT, arXiv 2411.01738).

    Both processes run the same call of the pipeline with the same seed, and both get the video, the same to the bit.
    Works with `accelerate`, in either order, and beside Ulysses in groups of two: then with one group of each pair.
    Sparse methods, caches and reports are of the branch that a process computes; forecast caches decide together, with
    a number exchanged in each step, so all calls of the pipeline are made by both. Without guidance, as with
    `guidance_free`, there is nothing to share, and each process computes all; in a run that had guidance before, the
    first one's passes are then the second one's, too.

    Args:
        pipe: a diffusers pipeline of a known family (`FAMILIES`) whose step has two passes, or both in a batch.
        group: of two processes; None for all of them.

    Returns:
        A handle with `note()` and `remove()`.

    Raises:
        TypeError: no transformer of the pipeline is known, or it never says whether a step has two passes.
        RuntimeError: no processes; a pipeline that is cfg-parallel already, or has a guidance cache, as such or with
            another one that shares a transformer; a transformer that was compiled as a whole. Later, in calls:
            processes with different latents in the first two steps, or a hook that came after this one.
        ValueError: the group has not two processes.
    """
    return CfgParallel(pipe, group)


def unshared_guidance(kind: type, family: Family, tells: bool) -> str:
    """Why the guidance of a pipeline cannot be shared; "" where it can.

    Args:
        kind: class of the pipeline.
        family: of its transformer.
        tells: it says whether a step has two passes; see `guidance_branches.guidance_of` and `tells_guidance`.
    """
    if any(c.__name__ in READS_BETWEEN for c in kind.__mro__):
        return (
            f"a {kind.__name__} works on what the first pass of a step gave before it makes the second, so they cannot "
            "be made at once"
        )
    if family.branches == TWO and not tells:
        return (
            f"a {kind.__name__} does not say whether a step has two passes, so they cannot be shared (its guidance is "
            "embedded, or made by true_cfg_scale)"
        )
    return other_branches(kind.__name__, family)
