"""`GuidanceCache`: in which steps the second pass of guidance is made, and what stands for it in the others."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...attention import DenseSchedule
from ...attention.account.plain_values import of_python


@dataclass(frozen=True)
class GuidanceCache:
    """What the difference of two passes of guidance is taken for where the second one is left out.

    From one step to the next, that difference changes far less than either pass. So it is kept (as the CFG-Cache of
    FasterCache does, arXiv 2410.19355, section 3.3), or goes on along its last change, a part of the way.

    Args:
        every: after the first steps, one second pass in so many is made; 2 at the least.
        first_steps: at the start of a run, of which both passes are made: a count, or a fraction from 0.0 to 1.0 as of
            `DenseSchedule`. Two at the least, whatever it says; all of them where it is a fraction and how many steps
            there are is not known.
        extrapolation: how far the difference goes on along its last change, from 0 (it is kept) to 1 (in full).

    Raises:
        ValueError: a value out of its bounds.
    """

    every: int = 3
    first_steps: int | float = 0.2
    extrapolation: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 2:
            raise ValueError(
                f"GuidanceCache.every is {self.every!r}: one second pass in so many is made, a whole number of at "
                f"least 2.{of_python(self.every)}"
            )
        try:
            DenseSchedule(first_steps=self.first_steps)
        except ValueError as error:
            raise ValueError(str(error).replace("DenseSchedule", "GuidanceCache")) from None
        value = self.extrapolation
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"GuidanceCache.extrapolation is {value!r}: it must be a number from 0 to 1.{of_python(value)}"
            )
        if not 0 <= value <= 1:
            raise ValueError(f"GuidanceCache.extrapolation is {value:g}: it must lie between 0 and 1.")

    def leaves_out(self, num_steps: int) -> bool:
        """Whether a run of so many steps leaves any pass out."""
        return num_steps > max(2, *self.schedule.steps_of(num_steps))

    def in_words(self) -> str:
        """What it does, for reports."""
        return f"one second pass in {self.every}"

    @property
    def schedule(self) -> DenseSchedule:
        """The steps of which both passes are made."""
        return DenseSchedule(first_steps=self.first_steps)
