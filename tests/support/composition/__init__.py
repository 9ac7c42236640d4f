"""What else people do to a video transformer, and what comes of each together with sparse attention."""

from __future__ import annotations

from .cells import FAMILY_BUILDS, compute, expected_file
from .levers import LEVERS, Lever

__all__ = ["FAMILY_BUILDS", "LEVERS", "Lever", "compute", "expected_file"]
