"""Counts runs and denoising steps from what a transformer is called with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...attention import StepInfo


class StepClock:
    """Tells the run, the step and the guidance branch of each forward pass.

    Timesteps fall within a run. One that rises, or a new table of timesteps in the scheduler, starts a run; the same
    one again is another guidance branch of the same step. One clock serves all transformers of a pipeline, so the
    second transformer of Wan 2.2 goes on counting where the first stopped. Steps count from the first one that is run:
    video-to-video at half strength starts at step 0 of half as many.

    Args:
        scheduler: gives the pipeline's scheduler of now (people swap it between runs), for the number of steps and the
            noise levels; gives None when there is no pipeline.
    """

    def __init__(self, scheduler: Callable[[], object | None]) -> None:
        self._scheduler = scheduler
        self._run = -1
        self._place = -1
        self._first = 0
        self._last: float | None = None
        self._table: torch.Tensor | None = None
        self._passes: dict[str, int] = {}

    def observe(self, timestep: torch.Tensor, model: str, branches: tuple[str, ...]) -> StepInfo:
        """Read one forward pass.

        Args:
            timestep: as the transformer got it: 0-dim, `[B]`, or `[B, tokens]` for Wan 2.2's image conditioning, whose
                clean tokens have a timestep of 0.
            model: the component that is called.
            branches: names for the passes of one step, in order.
        """
        value = float(timestep.max())
        scheduler = self._scheduler()
        table = getattr(scheduler, "timesteps", None)
        number = self._passes.get(model, 0)
        # Without a scheduler nothing else tells a loop at one timestep (a profiler's, say) from ever more branches.
        repeated = table is None and value == self._last and number >= len(branches)
        new_table = table is not None and table is not self._table
        starts = self._last is None or value > self._last or new_table or repeated
        if starts:
            self._run, self._place = self._run + 1, -1
        if starts or value != self._last:
            self._place = self._find(value, table)
            self._passes, number = {}, 0
        if starts:
            self._first = self._place
        self._last, self._table = value, table
        self._passes[model] = number + 1
        branch = branches[number] if number < len(branches) else f"pass {number}"
        steps = None if table is None else len(table) - self._first
        return StepInfo(self._run, self._place - self._first, steps, self._sigma(scheduler), branch)

    def _find(self, value: float, table: torch.Tensor | None) -> int:
        """The place of a timestep in the scheduler's table, else one more than the last."""
        if table is not None:
            places = (table.float() - value).abs() < 1e-3 * max(1.0, abs(value))
            # A second-order scheduler has each timestep twice: take the first place not behind the last step.
            for place in places.nonzero().flatten().tolist():
                if place > self._place:
                    return place
        return self._place + 1

    def _sigma(self, scheduler: object | None) -> float | None:
        """The noise level of the step; None for schedulers whose levels are not a flow's, from 0 to 1."""
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is None or self._place >= len(sigmas) or float(sigmas.max()) > 1.001:
            return None
        return float(sigmas[self._place])
