"""`ForecastSettings`: which steps may be forecast."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...attention.account.plain_values import of_python

FIRST = 3
"""Passes of a branch that are computed before the first forecast: two for a line, one to see the bend."""


@dataclass(frozen=True)
class ForecastSettings:
    """What a forecast cache goes by.

    Args:
        tolerance: of what a model makes, relative to its size, above 0: a step whose forecast is estimated to be off
            by more is computed.
        first_steps: at the start of a run, which are computed whatever is estimated. Of each branch the first `FIRST`
            passes are, whatever it says.
        last_steps: at its end, where the number of steps is known.
        most: steps in a row that are forecast; 0 for any number.

    Raises:
        ValueError: a value out of its bounds.
    """

    tolerance: float = 0.1
    first_steps: int = 3
    last_steps: int = 1
    most: int = 5

    def __post_init__(self) -> None:
        value = self.tolerance
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"ForecastSettings.tolerance is {value!r}: it must be a number above 0.{of_python(value)}")
        for name in ("first_steps", "last_steps", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                problem = f"it counts steps, as a whole number of 0 or more.{of_python(value)}"
                raise ValueError(f"ForecastSettings.{name} is {value!r}: {problem}")

    def keeps_all(self, num_steps: int) -> bool:
        """Whether a run of so many steps has none that may be forecast."""
        return max(self.first_steps, FIRST) + self.last_steps >= num_steps
