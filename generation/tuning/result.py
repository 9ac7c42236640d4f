"""What `tune` found: everything that was tried, and what was chosen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..report.decibel import of_mean_error
from .budget import Budget
from .prediction import Prediction
from .space import Candidate

if TYPE_CHECKING:
    from ...pipelines.presets import Preset

FOUND, NO_GAIN, NOTHING = "found", "no gain", "nothing within the budget"


@dataclass(frozen=True)
class Confirmed:
    """A candidate on whole videos.

    Args:
        seconds: of each prompt's video. dense: of the same prompts' dense videos.
        psnr: dB to the dense video, one a prompt; infinite where it is the same.
        error: over all steps on the inputs of the first prompt's dense run, see `Probe.error`; None with an adapter,
            whose passes are not those of the dense run.
        computed, forwards: passes of the transformers in a run that were computed, and all of them, the mean over the
            prompts.
        density: of attention in the passes that ran, the mean; 1.0 for dense.
        gain: times as fast as dense, measured once more, in turns with it, so that what else the machine does falls on
            both; empty where that was not done.
        halved: of the passes that were computed, those with one branch of guidance instead of two.
    """

    seconds: tuple[float, ...]
    dense: tuple[float, ...]
    psnr: tuple[float, ...]
    error: float | None
    computed: float
    forwards: float
    density: float = 1.0
    gain: tuple[float, ...] = ()
    halved: float = 0

    @property
    def median(self) -> float:
        """Seconds of a video."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Seconds over those of the dense video, the median over the prompts; in turns, where these were made."""
        if self.gain:
            return 1 / statistics.median(self.gain)
        return statistics.median(a / b for a, b in zip(self.seconds, self.dense, strict=True))

    @property
    def mean_psnr(self) -> float:
        """Of the mean squared error of all videos, in dB; infinite where none differs.

        So videos that are the same count as such, and one that is far off is not hidden behind them.
        """
        return of_mean_error(self.psnr)

    @property
    def quality(self) -> str:
        """How near to dense it is, in words."""
        own = f"a PSNR of {self.mean_psnr:.1f} dB" if math.isfinite(self.mean_psnr) else "an infinite PSNR"
        text = f"{own} to it"
        return text if self.error is None else f"{text} and an error of {self.error:.3g} a step"

    def to_dict(self) -> dict[str, Any]:
        """In types that JSON knows; the same videos have a PSNR of null."""
        psnr = [value if math.isfinite(value) else None for value in self.psnr]
        lists = {name: list(getattr(self, name)) for name in ("seconds", "dense", "gain")}
        return {**vars(self), **lists, "psnr": psnr}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Confirmed:
        """What `to_dict` made."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        values["psnr"] = tuple(math.inf if value is None else value for value in content["psnr"])
        return cls(**values)


@dataclass(frozen=True)
class Tried:
    """A candidate, and what became of it.

    Args:
        candidate: the lever or levers.
        predicted: from single steps; None where it was dropped before.
        confirmed: on whole videos; None where none were made.
        why: it is not the chosen one, in words; "" for the chosen one.
    """

    candidate: Candidate
    predicted: Prediction | None = None
    confirmed: Confirmed | None = None
    why: str = ""

    @property
    def error(self) -> float | None:
        """Predicted of a step; None where there is none, as with an adapter."""
        return None if self.predicted is None or self.candidate.adapter is not None else self.predicted.error


@dataclass(frozen=True, eq=False)
class Tuned:
    """The outcome.

    Args:
        outcome: `FOUND`, `NO_GAIN` (dense is the fastest within the budget) or `NOTHING`.
        budget: that was asked for.
        tried: everything, the confirmed ones first.
        preset: the chosen one; None unless `FOUND`.
        chosen: its entry in `tried`; where nothing is within the budget, the nearest to it.
        dense_seconds: of a dense video, the median.
        dropped: lever -> why it was not even measured.
        settings, environment: name -> value, shown as they are.
        prompts: of the videos.
        notes: in sentences.
        command: for a shell, to make a video with the preset, of the size and with the negative prompt of these; ""
            without one.
    """

    outcome: str
    budget: Budget
    tried: tuple[Tried, ...]
    dense_seconds: float
    preset: Preset | None = None
    chosen: Tried | None = None
    dropped: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""

    def __repr__(self) -> str:
        return f"<vidaccel tune: {self.outcome}. {self.in_words()}>"

    @property
    def gain(self) -> tuple[float, ...]:
        """Times as fast as dense, of each prompt that was made in turns with it; empty unless `FOUND`."""
        return self.chosen.confirmed.gain if self.outcome == FOUND else ()

    @property
    def confirmed(self) -> tuple[Tried, ...]:
        """Those that whole videos were made with."""
        return tuple(each for each in self.tried if each.confirmed is not None)

    def in_words(self) -> str:
        """The outcome, in one or two sentences."""
        if self.outcome == FOUND:
            own = self.chosen.confirmed
            text = f"{self.chosen.candidate.label}: {statistics.median(self.gain):.2f} times as fast as dense"
            if len(self.gain) > 1:
                text += f" ({min(self.gain):.2f} to {max(self.gain):.2f} over {len(self.gain)} prompts)"
            return f"{text}, at {own.quality}."
        if self.outcome == NO_GAIN:
            text = f"No gain here: within {self.budget}, nothing that was tried is faster than dense"
            return f"{text} on this machine ({self.dense_seconds:.3g} s a video)."
        text = f"Nothing that was tried is within {self.budget}, so no preset was written."
        if self.chosen is not None and (own := self.chosen.confirmed) is not None:
            text += f" The nearest is {self.chosen.candidate.label}: {own.ratio:.2f} of the dense time, "
            text += f"{own.quality}."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        rows = []
        for each in self.tried:
            predicted = None if each.predicted is None else {"seconds": each.predicted.seconds, "error": each.error}
            confirmed = None
            if each.confirmed is not None:
                own = each.confirmed
                psnr = own.mean_psnr if math.isfinite(own.mean_psnr) else None
                confirmed = {**own.to_dict(), "ratio": own.ratio, "psnr_mean": psnr}
            rows.append({"what": each.candidate.label, "predicted": predicted, "confirmed": confirmed, "why": each.why})
        return {
            "outcome": self.outcome,
            "in_words": self.in_words(),
            "budget": vars(self.budget),
            "preset": None if self.preset is None else self.preset.to_dict(),
            "command": self.command,
            "gain": list(self.gain),
            "dense_seconds": self.dense_seconds,
            "tried": rows,
            "dropped": dict(self.dropped),
            "prompts": list(self.prompts),
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "notes": list(self.notes),
        }
