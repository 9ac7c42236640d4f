"""What was measured of a preset lever by lever: the rows, what they say in words, and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..report.comparison import mean_psnr, over_what_differs
from .stages import Stage

if TYPE_CHECKING:
    from ...pipelines.presets import Preset

UNSURE = 0.1
"""A difference of less than this share is doubted: it must be more than what rounds differ by among themselves."""


@dataclass(frozen=True, eq=False)
class Row:
    """One stage, measured.

    Args:
        stage: what ran.
        steps, guidance_scale: of its calls.
        seconds: of whole calls of the pipeline, one list a round, one number a prompt.
        psnr: dB to the first row, one a prompt: the mean over the frames that differ; infinite where none does.
        right: whether each video shows what its prompt says; None where nothing checks it.
        forwards: passes of the transformer in a call, computed and skipped, the mean over the prompts.
        sample: frames of the first prompt, `[F, H, W, 3]` uint8.
        notes: of the run, in sentences.
        identical_frames: of all videos, those without any difference to the first row's.
        halved: of the passes that were computed, those with one branch of guidance instead of two, the mean.
    """

    stage: Stage
    steps: int
    guidance_scale: float | None
    seconds: tuple[tuple[float, ...], ...]
    psnr: tuple[float, ...]
    right: tuple[bool, ...] | None
    forwards: tuple[float, float]
    sample: np.ndarray
    notes: tuple[str, ...] = ()
    identical_frames: int = 0
    halved: float = 0

    @property
    def median(self) -> float:
        """Seconds of a call, the median over prompts and rounds."""
        return statistics.median(s for each in self.seconds for s in each)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the most of the rounds' medians: what the machine adds by itself."""
        medians = [statistics.median(each) for each in self.seconds]
        return min(medians), max(medians)

    @property
    def mean_psnr(self) -> float:
        """Mean over the prompts whose videos differ; infinite where none does, NaN where they cannot be compared."""
        return mean_psnr(self.psnr)

    @property
    def accuracy(self) -> float | None:
        """Share of the videos that show what their prompt says."""
        return None if self.right is None else statistics.fmean(self.right)


@dataclass(frozen=True, eq=False)
class Waterfall:
    """The rows of a preset, the plain base first.

    Args:
        preset: that was measured.
        rows: in the order in which its levers are added.
        prompts, seeds: of the videos.
        settings, environment: name -> value, shown as they are.
        notes: in sentences.
    """

    preset: Preset
    rows: tuple[Row, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<vidaccel waterfall, {len(self.rows)} rows. {self.in_words()}>"

    @property
    def leaves_out(self) -> bool:
        """Whether there are identical frames that a PSNR leaves out."""
        return any(row.identical_frames and math.isfinite(row.mean_psnr) for row in self.rows[1:])

    @property
    def halves(self) -> bool:
        """Whether any row has passes with one branch of guidance instead of two."""
        return any(row.halved for row in self.rows)

    def gain(self, row: Row) -> float:
        """How many times as fast as the first row."""
        return self.rows[0].median / row.median

    def gain_range(self, row: Row) -> tuple[float, float]:
        """The least and the most of that over the rounds."""
        first = [statistics.median(each) for each in self.rows[0].seconds]
        gains = [a / statistics.median(b) for a, b in zip(first, row.seconds, strict=True)]
        return min(gains), max(gains)

    def noise(self, row: Row) -> float:
        """By which share the rounds of the first row, or of this one, differ among themselves; NaN of one round."""
        if len(row.seconds) < 2:
            return math.nan
        return max((each.spread[1] - each.spread[0]) / each.median for each in (self.rows[0], row))

    def differs(self, row: Row) -> bool:
        """Whether a row takes another time than the first, as far as the rounds can tell.

        Not where each was the faster one in some round, nor where levers that leave passes out alone left none. Of a
        small difference (`UNSURE`), neither where the two are no further apart than the rounds of one of them, nor
        where they made the same videos in as many passes.
        """
        if self._cannot_gain(row):
            return False
        low, high = self.gain_range(row)
        if len(row.seconds) > 1 and low <= 1 <= high:
            return False
        return not self._small(row) or not (self._did_nothing(row) or abs(self.gain(row) - 1) <= self.noise(row))

    def _small(self, row: Row) -> bool:
        return abs(self.gain(row) - 1) < UNSURE

    def _cannot_gain(self, row: Row) -> bool:
        """Whether all of a row's levers act through passes that they leave out, and there were none."""
        return self._did_nothing(row) and set(row.stage.preset.levers()) <= {"cache", "guidance_cache"}

    def _did_nothing(self, row: Row) -> bool:
        as_many = (row.forwards, row.halved) == (self.rows[0].forwards, self.rows[0].halved)
        return as_many and all(value == math.inf for value in row.psnr)

    def in_words(self) -> str:
        """The gain of the whole preset in one sentence, with what it costs beside it."""
        first, last = self.rows[0], self.rows[-1]
        if self.differs(last):
            text = f"{self.preset.name}: {self.gain(last):.2f} times as fast as the plain base"
            text += f" ({last.median:.2f} s instead of {first.median:.2f} s a video"
            text += f"{self._doubt(last)})"
        elif self._did_nothing(last):
            text = f"{self.preset.name}: nothing gained, since no lever did anything: the same videos as the plain "
            return text + f"base makes, from as many passes ({last.median:.2f} s and {first.median:.2f} s a video)."
        else:
            text = f"{self.preset.name}: no gain that can be told from noise ({last.median:.2f} s a video with it and "
            text += f"{first.median:.2f} s without; rounds of the same differ by up to {self.noise(last):.0%})"
        if last.accuracy is not None:
            counts = (sum(row.right or ()) for row in (last, first))
            text += ", and {} instead of {} of {} videos show what their prompt says".format(*counts, len(self.prompts))
        elif math.isfinite(last.mean_psnr):
            text += f", at a PSNR of {last.mean_psnr:.1f} dB to it{over_what_differs(last.identical_frames)}"
        return text + "."

    def _doubt(self, row: Row) -> str:
        """What one round leaves open of a difference, in words; "" of several rounds."""
        if len(row.seconds) > 1:
            return ""
        if self._did_nothing(row):
            return "; the videos and the passes are the same, and more rounds tell whether the time is another"
        return "; a difference as small needs more rounds to be told from noise" if self._small(row) else ""

    def to_dict(self) -> dict[str, Any]:
        """Everything but pictures, in types that JSON knows (the same videos have a PSNR of null)."""
        rows = []
        for row in self.rows:
            finite = [value if math.isfinite(value) else None for value in row.psnr]
            rows.append(
                {
                    "lever": row.stage.name,
                    "what": row.stage.text,
                    "model": row.stage.model,
                    "steps": row.steps,
                    "guidance_scale": row.guidance_scale,
                    "median_seconds": row.median,
                    "seconds": [list(each) for each in row.seconds],
                    "times_as_fast": self.gain(row),
                    "times_as_fast_range": list(self.gain_range(row)),
                    "differs_from_base": self.differs(row),
                    "psnr_mean": row.mean_psnr if math.isfinite(row.mean_psnr) else None,
                    "psnr": finite,
                    "identical_frames": row.identical_frames,
                    "accuracy": row.accuracy,
                    "right": None if row.right is None else list(row.right),
                    "forwards_computed": row.forwards[0],
                    "forwards_skipped": row.forwards[1],
                    "forwards_halved": row.halved,
                    "notes": list(row.notes),
                }
            )
        return {
            "preset": self.preset.to_dict(),
            "gain": self.in_words(),
            "rows": rows,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "notes": list(self.notes),
        }
