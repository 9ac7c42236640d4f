"""What a preset may cost: the bounds that `tune` searches within."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import BadInput, mention

MIN_GAIN = 0.01
"""A preset that is faster by less than this share is no gain: less than what a machine adds by itself."""


@dataclass(frozen=True)
class Budget:
    """Bounds that all hold; None for none.

    Args:
        max_error: relative error of the transformer's output against dense, on dense inputs, over a run, in (0, 1].
        min_psnr: dB to the dense video of the same seed, of the mean squared error of all videos.
        max_time_ratio: seconds over those of the dense video, in (0, 1).

    With `max_time_ratio` the preset nearest to dense is wanted, otherwise the fastest.

    Raises:
        BadInput: none of them, or a value out of its bounds.
    """

    max_error: float | None = None
    min_psnr: float | None = None
    max_time_ratio: float | None = None

    def __post_init__(self) -> None:
        names = ("max_error", "min_psnr", "max_time_ratio")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if not given:
            others = ", ".join(mention(name) for name in names[:-1])
            raise BadInput(names[1], "is needed, or another bound", f"Give {others} or {mention(names[-1])}.")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise BadInput(name, "it must be a finite number", value=repr(value))
        if self.max_error is not None and not 0 < self.max_error <= 1:
            raise BadInput("max_error", "it must be above 0 and at most 1 (0.05 is 5 %)", value=self.max_error)
        if self.min_psnr is not None and not 0 < self.min_psnr <= 100:
            raise BadInput("min_psnr", "it must be above 0 and at most 100 dB", value=self.min_psnr)
        if self.max_time_ratio is not None and not 0 < self.max_time_ratio < 1:
            problem = "it must be between 0 and 1 (0.5 is twice as fast as dense)"
            raise BadInput("max_time_ratio", problem, value=self.max_time_ratio)

    @property
    def wants_nearest(self) -> bool:
        """Whether the preset nearest to dense is wanted instead of the fastest."""
        return self.max_time_ratio is not None

    def excess(self, error: float | None, psnr: float, ratio: float) -> float:
        """How far over the bounds something is, relative; 0 within all of them.

        6 dB of PSNR count as much as an error twice as large. An error that is not known (None) is within its bound.
        """
        over = 0.0
        if self.max_error is not None and error is not None:
            over += max(0.0, math.log2(max(error, 1e-12) / self.max_error))
        if self.min_psnr is not None:
            over += max(0.0, (self.min_psnr - psnr) / 6.02)
        if self.max_time_ratio is not None:
            over += max(0.0, math.log2(ratio / self.max_time_ratio))
        return over

    def misses(self, error: float | None, psnr: float, ratio: float) -> list[str]:
        """The bounds that something misses, in words."""
        told = []
        if self.max_error is not None and error is not None and error > self.max_error:
            told.append(f"error {error:.3g} above {self.max_error:g}")
        if self.min_psnr is not None and psnr < self.min_psnr:
            told.append(f"PSNR {psnr:.1f} dB below {self.min_psnr:g}")
        if self.max_time_ratio is not None and ratio > self.max_time_ratio:
            told.append(f"{ratio:.2f} of the dense time, above {self.max_time_ratio:g}")
        return told

    def __str__(self) -> str:
        told = [] if self.max_error is None else [f"error at most {self.max_error:g}"]
        told += [] if self.min_psnr is None else [f"PSNR at least {self.min_psnr:g} dB"]
        told += [] if self.max_time_ratio is None else [f"at most {self.max_time_ratio:g} of the dense time"]
        return ", ".join(told)
