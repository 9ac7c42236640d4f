"""Counts runs and denoising steps from what a transformer is called with."""

from __future__ import annotations

import torch

from ..attention import StepInfo


class StepClock:
    """Tells the run, the step and the guidance branch of each forward pass.

    Timesteps fall within a run. One that rises, or a new table of timesteps in the scheduler, starts a run; the same
    one again is another guidance branch of the same step. One clock serves all transformers of a pipeline, so the
    second transformer of Wan 2.2 goes on counting where the first stopped.

    Args:
        scheduler: the pipeline's, for the number of steps and the noise levels; None when there is no pipeline.
    """

    def __init__(self, scheduler: object | None) -> None:
        self.scheduler = scheduler
        self._run = -1
        self._step = -1
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
        table = getattr(self.scheduler, "timesteps", None)
        if self._last is None or value > self._last or (table is not None and table is not self._table):
            self._run, self._step = self._run + 1, -1
        if self._step < 0 or value != self._last:
            self._step = self._index(value, table)
            self._passes = {}
        self._last, self._table = value, table
        number = self._passes.get(model, 0)
        self._passes[model] = number + 1
        branch = branches[number] if number < len(branches) else f"pass {number}"
        return StepInfo(self._run, self._step, None if table is None else len(table), self._sigma(), branch)

    def _index(self, value: float, table: torch.Tensor | None) -> int:
        """The step of a timestep: its place in the scheduler's table, else one more than the last."""
        if table is not None:
            places = (table.float() - value).abs() < 1e-3 * max(1.0, abs(value))
            places = places.nonzero().flatten().tolist()
            # A second-order scheduler has each timestep twice: take the first place not behind the last step.
            for place in places:
                if place > self._step:
                    return place
        return self._step + 1

    def _sigma(self) -> float | None:
        sigmas = getattr(self.scheduler, "sigmas", None)
        return None if sigmas is None or self._step >= len(sigmas) else float(sigmas[self._step])
