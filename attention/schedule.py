"""Which steps and layers keep dense attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .account.plain_values import of_python

OTHERWISE = "whole numbers, in the place of fractions, say otherwise"
"""What a remark ends with, for who can."""
_UNKNOWN = (
    "how many steps it has is unknown here, where the scheduler that runs is not that of the accelerated pipeline. "
    "Give the pipeline that scheduler, or use a whole number of first_steps"
)


@dataclass(frozen=True)
class StepInfo:
    """Where in a denoising run an attention call happens.

    Args:
        run: number of the run, counted from 0.
        step: denoising step, counted from 0; a row of the scheduler's table, of which second-order schedulers have two
            for most of the steps that were asked for.
        num_steps: steps of the run, None when unknown.
        sigma: noise level of the step in [0, 1] for flow models, None when unknown.
        branch: the guidance branch, such as "cond" or "uncond".
        call: number of the pipeline's call that the run is a part of, counted from 0: a video that is made chunk by
            chunk has several runs. None where a run is all there is.
    """

    run: int = 0
    step: int = 0
    num_steps: int | None = None
    sigma: float | None = None
    branch: str = "cond"
    call: int | None = None


@dataclass(frozen=True)
class DenseSchedule:
    """The steps and layers that stay dense, because early steps set the composition and some layers see globally.

    A whole number counts; a float from 0.0 to 1.0 is a fraction, rounded up so that a small fraction keeps something.
    Fractions of steps are rounded down, the last ones first, where rounding up would keep half of a short run dense or
    more though less was asked for: 0.3 of 4 steps is 1, and 0.2 of 2 is none.

    Args:
        first_steps: steps at the start of a run.
        last_steps: steps at its end.
        first_layers: transformer blocks at the input. Blocks beside the main ones (Wan VACE) count as those that they
            feed.
        last_layers: blocks at the output.
        sigma_above: dense while the noise level is above this (one schedule for any number of steps); 0 takes in all.
        sigma_below: dense once the noise level is below this; 1 takes in all, that of the first step, too.

    Raises:
        ValueError: a negative count, or a fraction or sigma outside [0, 1].
    """

    first_steps: int | float = 0
    last_steps: int | float = 0
    first_layers: int | float = 0
    last_layers: int | float = 0
    sigma_above: float | None = None
    sigma_below: float | None = None

    def __post_init__(self) -> None:
        for name in ("first_steps", "last_steps", "first_layers", "last_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"DenseSchedule.{name} is {value!r}: give a count (int >= 0) or a fraction (0.0 to 1.0)."
                    f"{of_python(value)}"
                )
            if isinstance(value, float) and value > 1:
                raise ValueError(
                    f"DenseSchedule.{name} is {value}: a float is a fraction and at most 1.0; "
                    f"write {math.ceil(value)} for a count."
                )
        for name in ("sigma_above", "sigma_below"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(
                    f"DenseSchedule.{name} is {value!r}: a noise level is a number from 0 to 1.{of_python(value)}"
                )

    def given(self) -> dict[str, int | float]:
        """The fields that are not their defaults, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @property
    def needs_num_steps(self) -> bool:
        """Whether it can only be followed when the number of steps of a run is known."""
        return bool(self.last_steps) or (isinstance(self.first_steps, float) and self.first_steps > 0)

    @property
    def needs_sigma(self) -> bool:
        """Whether it can only be followed when the noise level of a step is known."""
        return self.sigma_above is not None or self.sigma_below is not None

    def warning(self, num_steps: int | None, num_layers: int) -> str:
        """Why nothing would ever be sparse in a run, or nothing dense though it is asked for; empty if neither holds.

        Args:
            num_steps: steps of the run, None when unknown. num_layers: blocks of the model.
        """
        if reason := self.nothing_sparse(num_steps, num_layers):
            # A call of a pipeline may have longer runs beside this one, of other sizes.
            where = f" in runs of {num_steps} steps" if self._all_steps(num_steps) else ""
            return f"{self._asked()}: {reason}, so nothing will be sparse{where}"
        layers = any(_count(value, num_layers) for value in (self.first_layers, self.last_layers))
        bounds = any(bound is not None for bound in (self.sigma_above, self.sigma_below))
        never = (self.sigma_above in (None, 1)) and (self.sigma_below in (None, 0))
        if bounds and never and not layers and not (self.first_steps or self.last_steps):
            return f"{self._asked()}: no noise level is beyond these bounds, so nothing will be dense"
        return ""

    def _asked(self) -> str:
        """What it is set to, where it is set: "first_steps 0.3, last_layers 2"."""
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name} {value}" for name, value in given if value or (value == 0 and "sigma" in name))

    def nothing_sparse(self, num_steps: int | None, num_layers: int) -> str:
        """Why every call of a run stays dense; empty where some may be sparse, as far as is known. Args: as above."""
        layers = sum(_count(value, num_layers) for value in (self.first_layers, self.last_layers))
        bounds = [b for b in (self.sigma_above, self.sigma_below) if b is not None]
        all_levels = self._all_above or self._all_below or (len(bounds) == 2 and bounds[0] < bounds[1])
        if layers >= num_layers:
            return f"all {num_layers} layers stay dense"
        if self._all_steps(num_steps):
            return f"all {num_steps} steps stay dense"
        return "every noise level stays dense" if all_levels else ""

    def _all_steps(self, num_steps: int | None) -> bool:
        """Whether all steps of a run of so many stay dense by their number."""
        return num_steps is not None and sum(self.steps_of(num_steps)) >= num_steps

    def steps_of(self, num_steps: int) -> tuple[int, int]:
        """How many steps at the start and at the end of a run stay dense, fractions resolved.

        Args:
            num_steps: steps of the run.
        """
        asked = (self.first_steps, self.last_steps)
        first, last = (_count(value, num_steps) for value in asked)
        share = sum(value if isinstance(value, float) else value / num_steps for value in asked)
        if share < 0.5:
            if isinstance(asked[1], float) and 2 * (first + last) >= num_steps:
                last = math.floor(round(asked[1] * num_steps, 9))
            if isinstance(asked[0], float) and 2 * (first + last) >= num_steps:
                first = math.floor(round(asked[0] * num_steps, 9))
        return first, last

    def remark(self, num_steps: int | None) -> str:
        """What a report should say of the fractions in a run of so many steps; empty where they are rounded up."""
        if num_steps is None:
            return ""
        up = sum(_count(value, num_steps) for value in (self.first_steps, self.last_steps))
        kept = sum(self.steps_of(num_steps))
        if kept == up:
            return ""
        return (
            f"the run has {num_steps} steps, and the schedule's fractions keep {kept or 'none'} of them dense instead "
            f"of {up}, which would be half of it or more: {OTHERWISE}"
        )

    def dense_reason(self, step: StepInfo, layer: int, num_layers: int) -> str:
        """Why this call stays dense, in words; empty when it may be sparse.

        Raises:
            ValueError: the schedule needs the number of steps (for a fraction, or the last ones) or the noise level
                and it is unknown.
        """
        if reason := self._by_step(step):
            return reason
        return self.layer_reason(layer, num_layers) or self._by_level(step)

    def layer_reason(self, layer: int, num_layers: int) -> str:
        """Why a layer stays dense in all steps, in words; empty when it may be sparse."""
        if layer < _count(self.first_layers, num_layers):
            return "first layers"
        if layer >= num_layers - _count(self.last_layers, num_layers):
            return "last layers"
        return ""

    def step_reason(self, step: StepInfo) -> str:
        """Why a step stays dense in all layers; empty when it may be sparse. Raises as `dense_reason` does."""
        return self._by_step(step) or self._by_level(step)

    def _by_step(self, step: StepInfo) -> str:
        if step.sigma is None and self.needs_sigma:
            name = "sigma_above" if self.sigma_above is not None else "sigma_below"
            raise ValueError(
                f"DenseSchedule.{name} needs the noise level of each step, which is unknown here: the scheduler's "
                "levels are not those of a flow, or there is no scheduler. Use first_steps and last_steps."
            )
        if self.last_steps and step.num_steps is None:
            raise ValueError(f"DenseSchedule.last_steps={self.last_steps} counts from the end of a run: {_UNKNOWN}.")
        if step.num_steps is None and isinstance(self.first_steps, float) and self.first_steps > 0:
            raise ValueError(
                f"DenseSchedule.first_steps={self.first_steps} is a fraction of the steps of a run: {_UNKNOWN}."
            )
        first, last = (self.first_steps, 0) if step.num_steps is None else self.steps_of(step.num_steps)
        if step.step < first:
            return "first steps"
        if last and step.step >= step.num_steps - last:
            return "last steps"
        return ""

    def _by_level(self, step: StepInfo) -> str:
        if self.sigma_above is not None and (self._all_above or step.sigma > self.sigma_above):
            return f"sigma above {self.sigma_above}"
        if self.sigma_below is not None and (self._all_below or step.sigma < self.sigma_below):
            return f"sigma below {self.sigma_below}"
        return ""

    # A bound at the far end of all levels includes that end, or the first step of a flow, at 1, would be none of them.

    @property
    def _all_above(self) -> bool:
        return self.sigma_above == 0

    @property
    def _all_below(self) -> bool:
        return self.sigma_below == 1


def check_kind(name: str, schedule: object) -> None:
    """Raise a TypeError that names what is given in the place of a schedule."""
    if not isinstance(schedule, DenseSchedule):
        raise TypeError(f"{name} is {schedule!r}: give a DenseSchedule, such as DenseSchedule(first_steps=0.2).")


def _count(value: int | float, total: int) -> int:
    """A count from a count or a fraction of `total`, rounded up."""
    if isinstance(value, int):
        return value
    # 0.3 * 10 is 3.0000000000000004 in floating point: that must be 3, not 4.
    return math.ceil(round(value * total, 9))
