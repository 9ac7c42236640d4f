"""The settings of RIFLEx; needs torch alone, so that headers of files can be read without diffusers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Riflex:
    """RIFLEx (arXiv 2502.15894, section 3).

    The rotary embedding of a frame at position t has the angles theta_j t, theta_j falling with j. The component whose
    period 2 pi / theta_j the model knows as about one video, the *intrinsic* one, begins anew in a longer video, and so
    does what is seen. In a video of L s latent frames, its frequency is lowered to 2 pi / (L s): one period for all of
    it. The published code takes 0.9 of that; this is the paper's equation 8.

    Args:
        frames: L, latent frames of the videos that the model was trained on. Videos of no more are left as they are.
        component: number k of the intrinsic component, counted from 1; None for the first whose period is at least L.

    Raises:
        ValueError: less than one frame, or a component below 1.
    """

    frames: int
    component: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("frames", self.frames), ("component", self.component)):
            none = name == "component" and value is None
            if not none and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"Riflex {name} is {value!r}: it must be a whole number of at least 1.")

    def chosen(self, frequencies: torch.Tensor) -> int:
        """k, from 1, among frequencies `[D / 2]` in radians a latent frame, the highest first.

        Raises:
            ValueError: there is no such component, or none with so long a period.
        """
        count = len(frequencies)
        if self.component is not None:
            if self.component > count:
                raise ValueError(f"Riflex component is {self.component}: this model has {count} over frames.")
            return self.component
        enough = 2 * math.pi / frequencies >= self.frames
        if not enough.any():
            longest = 2 * math.pi / float(frequencies[-1])
            raise ValueError(
                f"Riflex frames is {self.frames}: no component of this model has a period of that, the longest has "
                f"{longest:.0f}. It needs no RIFLEx, or give component."
            )
        return int(enough.int().argmax()) + 1
