"""The measurements of `tune` on a real pipeline, each written to the journal before the next begins."""

from __future__ import annotations

import io
import logging
import math
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...pipelines.files.whole_files import write_bytes
from ..compiled import uncompiled
from ..errors import BadInput, worded
from ..levers.presets import refusals
from ..report.comparison import compare
from ..requests.settings import Settings
from ..run import GenerationError, run, warm_up
from .adapters import AdapterLever
from .journal import Journal
from .prediction import DenseRun
from .result import Confirmed
from .space import Candidate
from .trajectory import Clock, Probe, Trajectory, as_bytes, probe, probed_steps, record

logger = logging.getLogger(__name__)

ROWS = 32
"""Queries of each sparse call that the meter measures."""
MADE_NAN = "it made NaN or infinity"
TURNS = 4
"""Prompts whose videos are made once more, dense and with the chosen preset in turns."""
Done = Callable[[str, int, int], None]
"""Told of what is measured: in words, and which of how many videos of it."""


class Bench:
    """A pipeline, the videos that it makes without anything, and how presets are measured against these.

    Args:
        pipe: loaded, and as it is.
        settings: checked; of the first prompt.
        prompts, seeds: of the videos.
        journal: of what was measured. folder: where the dense videos are kept beside it.
        base: see `apply`.
        tell: see `Done`.
        clock: of all times.
    """

    def __init__(
        self,
        pipe: Any,
        settings: Settings,
        prompts: Sequence[str],
        seeds: Sequence[int],
        journal: Journal,
        folder: Path,
        *,
        base: str | None = None,
        tell: Done = lambda what, number, count: None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.pipe, self.settings, self.journal, self.folder = pipe, settings, journal, folder
        self.requests = [replace(settings, prompt=p, seed=s) for p, s in zip(prompts, seeds, strict=True)]
        self._base, self._tell, self._clock = base, tell, clock
        self._frames: list[np.ndarray] = []
        self._trajectories: dict[AdapterLever | None, Trajectory] = {}
        self._warm = False

    def dense(self, layers: int) -> DenseRun:
        """The dense video of each prompt, and what the first one's steps took."""
        times = self.journal.get("dense")
        files = [self.folder / f"dense.{number}.npz" for number in range(len(self.requests))]
        if times is None or not all(file.is_file() for file in files):
            trajectory, frames = self._record()
            seconds, cut = [trajectory.whole], [*trajectory.cut]
            _save(frames, files[0])
            for number, request in enumerate(self.requests[1:], 1):
                self._tell("dense", number, len(self.requests))
                frames, taken, made = self._video(request)
                seconds.append(taken)
                cut += made.cut
                _save(frames, files[number])
            times = {"seconds": seconds, "cut": [*dict.fromkeys(map(worded, cut))], **_times(trajectory)}
            self.journal.put("dense", times)
        self._frames = [_load(file) for file in files]
        self.seconds = tuple(times["seconds"])
        self.cut = tuple(times.get("cut", ()))  # not in journals of before it was told
        for note in self.cut:  # before hours of work on a prompt that is not the one that was meant
            logger.warning(note)
        return DenseRun(times["steps"], layers, times["step"], times["other"])

    def run(self, adapter: AdapterLever, layers: int) -> DenseRun | str:
        """The run with an adapter, dense; why it cannot be, where the pipeline refuses it."""
        key = f"adapter {Candidate(adapter=adapter).key}"
        times = self._tried(key, lambda: _times(self._recorded(adapter)))
        return times if isinstance(times, str) else DenseRun(times["steps"], layers, times["step"], times["other"])

    def ratios(self) -> list[float]:
        """MagCache's, of the first prompt."""
        from ...pipelines.presets import measure_mag_ratios

        found = self.journal.get("mag_ratios")
        if found is None:
            self._tell("ratios of MagCache", 0, 1)
            with refusals():
                found = measure_mag_ratios(self.pipe, lambda: run(self.pipe, self.requests[0], decode=False))
            self.journal.put("mag_ratios", found)
        return found

    def probe(self, candidate: Candidate, *, whole: bool = False) -> Probe | str:
        """Steps of a candidate; why it cannot be, where the pipeline refuses it.

        Args:
            candidate: to be measured.
            whole: in all steps, as one with a cache of whatever kind always is.
        """
        key = f"{'run' if whole else 'step'} {candidate.key}"
        made = self._tried(key, lambda: self._probe(candidate, whole).to_dict())
        if isinstance(made, str):
            return made
        found = Probe.from_dict(made)
        return found if math.isfinite(found.error) else MADE_NAN

    def _probe(self, candidate: Candidate, whole: bool) -> Probe:
        trajectory = self._recorded(candidate.adapter)
        self._tell(candidate.label, 0, 1)
        steps = trajectory.num_steps
        cached = candidate.cache is not None or candidate.guidance is not None
        asked = range(steps) if whole or cached else probed_steps(steps)
        request = _with(candidate, self.requests[0])
        options: dict[str, Any] = {"base": self._base, "clock": self._clock}

        def measured(rows: int) -> Probe:
            return probe(self.pipe, request, trajectory, candidate.preset(), asked, rows=rows, **options)

        made = measured(0)
        if whole or candidate.sparse is None or made.step_seconds >= trajectory.step_seconds:
            return made
        return replace(made, attention=measured(ROWS).attention)  # by itself: the meter takes time

    def confirm(self, candidate: Candidate) -> Confirmed | str:
        """The video of each prompt with a candidate, and what turns with dense told of it, where they were made.

        Why it cannot be, where the pipeline refuses it.
        """
        error = None
        if candidate.adapter is None:
            whole = self.probe(candidate, whole=True)
            if isinstance(whole, str):
                return whole
            error = whole.error
        made = self._tried(_videos(candidate), lambda: self._confirm(candidate, error).to_dict())
        if isinstance(made, str):
            return made
        return replace(Confirmed.from_dict(made), gain=tuple(self.journal.get(_turns(candidate)) or ()))

    def knows(self, candidate: Candidate) -> bool:
        """Whether `confirm` has been asked about a candidate before."""
        return self.journal.get(_videos(candidate)) is not None

    def _confirm(self, candidate: Candidate, error: float | None) -> Confirmed:
        from ...pipelines.presets import apply
        from ...pipelines.presets.account import mean_count

        seconds, psnr, accounts = [], [], []
        with apply(self.pipe, candidate.preset(), base=self._base) as applied:
            warm_up(self.pipe, self.settings, None, applied)
            applied.reset()
            for number, request in enumerate(self.requests):
                self._tell(candidate.label, number, len(self.requests))
                frames, taken, _ = self._video(_with(candidate, request))
                seconds.append(taken)
                psnr.append(_psnr(self._frames[number], frames))
                accounts.append(applied.report().last())  # a cache that goes by content skips more of some
        computed, forwards, halved = (mean_count(accounts, name) for name in ("computed", "forwards", "halved"))
        sparse = [record.density for a in accounts if a.attention is not None for record in a.attention.records]
        density = float(np.mean(sparse)) if sparse else 1.0
        made = (tuple(seconds), self.seconds, tuple(psnr), error)
        return Confirmed(*made, computed, forwards, density, halved=halved)

    def gains(self, candidate: Candidate) -> tuple[float, ...]:
        """Seconds of dense over those of a candidate, of the first few prompts, the two in turns.

        So what the machine does beside falls on both.
        """
        from ...pipelines.presets import apply

        key = _turns(candidate)
        found = self.journal.get(key)
        if found is None:
            found = []
            for number, request in enumerate(few := self.requests[:TURNS]):
                self._tell(f"dense and {candidate.label}, in turns", number, len(few))
                dense = self._video(request)[1]
                with apply(self.pipe, candidate.preset(), base=self._base) as applied:
                    if not number:
                        warm_up(self.pipe, self.settings, None, applied)
                    found.append(dense / self._video(_with(candidate, request))[1])
            self.journal.put(key, found)
        return tuple(found)

    def _recorded(self, adapter: AdapterLever | None = None) -> Trajectory:
        """The dense run of the first prompt, plain or with an adapter, made once in a process."""
        if adapter not in self._trajectories:
            self._record(adapter)
        return self._trajectories[adapter]

    def _record(self, adapter: AdapterLever | None = None) -> tuple[Trajectory, np.ndarray]:
        from ...pipelines.presets import apply

        if adapter is None:
            self._tell("dense", 0, len(self.requests))
            self._warmed()
            made = record(self.pipe, self.requests[0], self._clock)
        else:
            candidate = Candidate(adapter=adapter)
            self._tell(f"{candidate.label}, dense", 0, 1)
            with apply(self.pipe, candidate.preset(), base=self._base):
                warm_up(self.pipe, self.settings, None)
                made = record(self.pipe, _with(candidate, self.requests[0]), self._clock)
        self._trajectories[adapter] = made[0]
        return made

    def _warmed(self) -> None:
        if not self._warm:
            warm_up(self.pipe, self.settings, None)
            self._warm = True

    def _video(self, request: Settings) -> tuple[np.ndarray, float, Any]:
        """Its frames, its seconds and the run."""

        def timed() -> tuple[np.ndarray, float, Any]:
            start = self._clock()
            made = run(self.pipe, request)
            seconds = self._clock() - start
            return as_bytes(made.frames), seconds, made

        self._warmed()
        return uncompiled(timed)[0]

    def _tried(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
        """From the journal, or measured and written there; a refusal, NaN or too little memory is a text.

        What had too little memory is tried again by another call: the device may have been busy.
        """
        import torch

        from ...attention.call_checks import NotFinite
        from ...pipelines.presets import PresetError

        made = self.journal.get(key)
        if made is None:
            try:
                made = measure()
            except torch.OutOfMemoryError:
                return "out of memory"
            except NotFinite:
                made = {"refused": MADE_NAN}
            except (PresetError, GenerationError) as error:
                made = {"refused": str(error)}
            self.journal.put(key, made)
        return made.get("refused", made)


def _videos(candidate: Candidate) -> str:
    return f"mean error of videos {candidate.key}"  # journals of before it was that say "videos"


def _turns(candidate: Candidate) -> str:
    return f"turns {candidate.key}"


def _with(candidate: Candidate, request: Settings) -> Settings:
    """The request of a candidate: an adapter may have steps of its own."""
    steps = None if candidate.adapter is None else candidate.adapter.steps
    return request if steps is None else replace(request, steps=steps)


def _times(trajectory: Trajectory) -> dict[str, Any]:
    """What predictions need of a dense run."""
    other = trajectory.whole - sum(trajectory.seconds)
    return {"steps": trajectory.num_steps, "step": trajectory.step_seconds, "other": other}


def _psnr(reference: np.ndarray, other: np.ndarray) -> float:
    value = compare(reference, other).psnr_of_mean_error
    return value if not math.isnan(value) else 0.0


def _save(frames: np.ndarray, file: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, frames=frames)
    write_bytes(buffer.getvalue(), file)


def _load(file: Path) -> np.ndarray:
    try:
        with np.load(file) as content:
            return content["frames"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        fix = f"Delete {file}: the dense videos are then made anew."
        raise BadInput("out", f"{file.name}, a dense video that an earlier run left, cannot be read", fix) from error
