"""Noise levels that a pipeline gives its scheduler although nobody asked for any.

HunyuanVideo, LTX and others always give some, evenly spaced, for the scheduler to shift. A scheduler whose levels are
those of a distillation takes their number, and nothing else of them.
"""

from __future__ import annotations

from collections.abc import Sequence

_OFF = 0.01  # pipelines begin at 1 or a little below (0.999)


def steps_of(sigmas: Sequence[float]) -> int:
    """The number of steps that evenly spaced levels stand for.

    Args:
        sigmas: n levels, from about 1 in steps of 1/n.

    Raises:
        ValueError: they are spaced otherwise, so somebody wants them.
    """
    count = len(sigmas)
    if any(abs(float(sigma) - (1 - row / count)) > _OFF for row, sigma in enumerate(sigmas)):
        raise ValueError("sigmas is given, but the noise levels are those of the training: leave it out.")
    return count
