"""What else people do to a video transformer, and what comes of each together with sparse attention.

`cd tests/support && python -m composition` computes every cell of the table and writes it to `tests/data`.
"""

from __future__ import annotations

from .cells import FAMILY_BUILDS, ORDERS, compute
from .levers import LEVERS, Lever
from .table import read, write

__all__ = ["FAMILY_BUILDS", "LEVERS", "ORDERS", "Lever", "compute", "read", "write"]
