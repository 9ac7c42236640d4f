"""`ForecastSettings`: which steps may be forecast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForecastSettings:
    """What a forecast cache goes by.

    Args:
        tolerance: of what a model makes, relative to its size, above 0: a step whose forecast is estimated to be off
            by more is computed.
        first_steps: at the start of a run, which are computed whatever is estimated. Of each branch three passes are,
            whatever it says: two for a line, one to see the bend.
        last_steps: at its end, where the number of steps is known.
        most: steps in a row that are forecast; 0 for any number.
    """

    tolerance: float = 0.1
    first_steps: int = 3
    last_steps: int = 1
    most: int = 5
