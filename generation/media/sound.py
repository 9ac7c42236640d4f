"""The sound of a video, of models that make one with it."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Sound:
    """Samples of a sound.

    Args:
        samples: `[S, C]` float32 in [-1, 1], one or two channels.
        rate: samples per second.
    """

    samples: np.ndarray
    rate: int

    @classmethod
    def of(cls, samples: Any, rate: int) -> Sound:
        """From a tensor or an array, `[S]` or `[C, S]`."""
        values = np.asarray(samples.detach().float().cpu() if hasattr(samples, "detach") else samples, np.float32)
        return cls(np.atleast_2d(values).T.clip(-1, 1), rate)

    def write_wav(self, path: Path, seconds: float) -> None:
        """Write the samples in 16 bits, no more than so many seconds."""
        kept = self.samples[: round(seconds * self.rate)]
        with wave.open(str(path), "wb") as file:
            file.setnchannels(self.samples.shape[1])
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes((kept * 32767).round().astype("<i2").tobytes())
