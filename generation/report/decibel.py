"""PSNR and the mean squared difference that it stands for, of values in [0, 1]."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable


def square(psnr: float) -> float:
    """The mean squared difference of a PSNR in dB; 0 of an infinite one."""
    return 10 ** (-psnr / 10)


def decibel(mean_square: float) -> float:
    """The PSNR of a mean squared difference; infinite of 0."""
    return -10 * math.log10(mean_square) if mean_square else math.inf


def of_mean_error(psnrs: Iterable[float]) -> float:
    """The PSNR of the mean squared difference over what has some PSNRs; infinite ones count as no difference."""
    return decibel(statistics.fmean(map(square, psnrs)))
