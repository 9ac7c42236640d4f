"""What the inputs of a method start with: what the method itself has, as in Python and on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..attention import Method

DENSITY = 0.3
"""Of a method that has no density of its own (SVG2, Radial, Sparge): a node always gives it one."""


@dataclass(frozen=True)
class Defaults:
    """What a sparse call computes, and what stays dense.

    Args:
        density: pairs computed over all pairs. own_density: whether it is the method's own, and not `DENSITY`.
        start, end: shares of the steps that stay dense.
        layers: so many transformer blocks at the input stay dense.
    """

    density: float
    own_density: bool
    start: float
    end: float
    layers: int


def defaults_of(method: type[Method]) -> Defaults:
    """Of a method; all are fields of its config, whose dense steps are shares and whose dense layers are a count."""
    made = method()
    density, schedule = getattr(made, "density", None), made.schedule
    own = density is not None
    shares = (float(schedule.first_steps), float(schedule.last_steps))
    return Defaults(density if own else DENSITY, own, *shares, int(schedule.first_layers))
