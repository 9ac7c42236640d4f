"""What a candidate will take and cost, from steps that were measured: no video is made for it."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ...attention.schedule import DenseSchedule, StepInfo
from ..report.decibel import decibel, square
from .space import Candidate
from .trajectory import Probe

if TYPE_CHECKING:
    from ...pipelines.guidance_cache.settings import GuidanceCache

Name = TypeVar("Name", int, str)

_FIRST_GUESS = 8.0
"""PSNR of a relative error of 1, in dB, before any video was measured."""


@dataclass(frozen=True)
class DenseRun:
    """What of the dense run predictions are made from.

    Args:
        steps: of a run. layers: of the transformer.
        step_seconds: in the transformers.
        other_seconds: of a video, outside of them.
    """

    steps: int
    layers: int
    step_seconds: float
    other_seconds: float

    @property
    def seconds(self) -> float:
        """Of a video."""
        return self.other_seconds + self.steps * self.step_seconds


@dataclass(frozen=True)
class Prediction:
    """Of a video.

    Args:
        seconds: of the whole call of the pipeline.
        error: root mean square over the steps, see `Probe.error`; of one with an adapter, on the run with that.
        adapter_psnr: dB to dense that its adapter alone has; infinite for none.
    """

    seconds: float
    error: float
    adapter_psnr: float = math.inf


def predict(
    candidate: Candidate,
    dense: DenseRun,
    sparse: Probe | None,
    cache: Probe | None,
    in_layers: Probe | None = None,
    guidance: Probe | None = None,
    adapter_psnr: float = math.inf,
) -> Prediction:
    """Seconds and error of a candidate.

    Args:
        candidate: to be told of.
        dense: the run without it; with the adapter of a candidate that has one.
        sparse: of its method, in all steps and layers; None where it has none.
        cache: of its cache alone, in all steps; None where it has none.
        in_layers: of its layers in 8 bits, compiled, or both; None where they are as they were.
        guidance: of its second passes left out alone, in all steps; None where it leaves none out.
        adapter_psnr: see `Prediction`. An adapter makes other passes than the plain model, so that no error of its
            steps can be measured.
    """
    steps, layers = dense.steps, dense.layers
    errors, dense_seconds = np.zeros(steps), dense.step_seconds
    if in_layers is not None:
        errors = np.interp(range(steps), list(in_layers.errors), list(in_layers.errors.values()))
        dense_seconds = in_layers.step_seconds
    of_layers, sparse_seconds = errors, dense_seconds
    kept, schedule = np.zeros(steps, dtype=bool), None
    if sparse is not None:
        schedule = candidate.schedule or candidate.sparse.method.schedule
        kept = np.array([bool(schedule.step_reason(StepInfo(0, step, steps))) for step in range(steps)])
        first = schedule.first_layers
        first = min(layers, first if isinstance(first, int) else math.ceil(first * layers))
        errors = np.interp(range(steps), list(sparse.errors), list(sparse.errors.values()))
        errors = np.hypot(of_layers, np.where(kept, 0.0, errors * _left_after(sparse, first, layers)))
        # Attention and linear layers are apart, so that what the two save adds up.
        saved = (layers - first) / layers * (dense.step_seconds - sparse.step_seconds)
        sparse_seconds = max(dense_seconds - saved, 0.0)
    seconds = np.where(kept, dense_seconds, sparse_seconds)
    share = np.ones(steps)
    if cache is not None:
        share = np.array([cache.computed.get(step, 1.0) for step in range(steps)])
        skipped = [cache.seconds[step] for step in cache.seconds if not cache.computed[step]]
        share = np.where(kept, 1.0, share)
        seconds = share * seconds + (1 - share) * (statistics.median(skipped) if skipped else 0.0)
        of_cache = np.array([cache.errors.get(step, 0.0) for step in range(steps)])
        errors = np.sqrt(share * errors**2 + np.where(kept, 0.0, of_cache) ** 2)
    if guidance is not None:
        missing = guidance.incomplete
        left = np.isin(range(steps), missing)
        if cache is not None or schedule is not None:
            left = np.array(_left_out(candidate.guidance, tuple(map(bool, share)), schedule))
        # Of two passes as much is left, whatever makes each of them faster.
        rest = statistics.median(guidance.seconds[step] for step in missing) / dense.step_seconds
        seconds = np.where(left, rest * seconds, seconds)
        of_guidance = np.interp(range(steps), missing, [guidance.errors[step] for step in missing])
        errors = np.hypot(errors, np.where(left, of_guidance, 0.0))
    error = float(np.sqrt(np.mean(errors**2)))
    return Prediction(dense.other_seconds + float(seconds.sum()), error, adapter_psnr)


@functools.lru_cache(maxsize=4096)
def _left_out(settings: GuidanceCache, computed: tuple[bool, ...], dense: DenseSchedule | None) -> tuple[bool, ...]:
    """See `left_out`; combinations that differ in other levers ask the same."""
    from ...pipelines.guidance_cache.differences import left_out

    return left_out(settings, computed, dense)


def _left_after(probe: Probe, first: int, layers: int) -> float:
    """Share of an error that is left where the first layers are dense, by what the meter found in each."""
    if not first:
        return 1.0
    if len(probe.attention) != layers:
        return math.sqrt(1 - first / layers)
    each = np.array([statistics.fmean([e for e in row if e is not None] or [0.0]) for row in probe.attention]) ** 2
    return float(np.sqrt(each[first:].sum() / each.sum())) if each.sum() else 1.0


@dataclass
class Calibration:
    """What whole videos taught about predictions: PSNR by error, and seconds.

    Errors of one kind (a method, a cache) become the same loss of PSNR; those of another need not, so that of a kind
    without videos nothing is known (`knows`) but what errors of this model become by and large. What an adapter and
    what other levers change adds up, as the squares of differences do.
    """

    _psnr: dict[str, list[float]] = field(default_factory=dict)
    _seconds: list[float] = field(default_factory=list)

    def learn(self, kind: str, predicted: Prediction, seconds: float, psnr: float) -> None:
        """Hold a video against its prediction.

        Args:
            kind: see `Candidate.kind`.
        """
        self._seconds.append(seconds / predicted.seconds)
        of_levers = square(psnr) - square(predicted.adapter_psnr)
        if kind and of_levers > 0 and predicted.error > 0:
            self._psnr.setdefault(kind, []).append(decibel(of_levers) + 20 * math.log10(predicted.error))

    def knows(self, kind: str) -> bool:
        """Whether videos taught what its errors become: its own, or those of a kind that has a lever of it."""
        return bool(self._related(kind))

    def psnr(self, kind: str, predicted: Prediction) -> float:
        """Expected of a video, in dB; infinite where nothing is off.

        Of a kind that is not known (`knows`), a guess between the other kinds: no promise, only an order to try in.
        """
        total = square(predicted.adapter_psnr)
        if predicted.error > 0:
            # Each other kind counts once: many videos of one say no more of this one.
            known = self._related(kind) or [statistics.median(each) for each in self._psnr.values()]
            total += square((statistics.median(known) if known else _FIRST_GUESS) - 20 * math.log10(predicted.error))
        return decibel(total)

    def _related(self, kind: str) -> Sequence[float]:
        """What videos of a kind taught; where there are none, those of kinds with a lever of it."""
        if own := self._psnr.get(kind):
            return own
        levers = set(kind.split("+"))
        return [value for other, each in self._psnr.items() if levers & set(other.split("+")) for value in each]

    def seconds(self, predicted: float) -> float:
        """Expected of a video."""
        return predicted * (statistics.median(self._seconds) if self._seconds else 1.0)


def front(points: Mapping[Name, Prediction]) -> set[Name]:
    """The names of those than which none is both as fast and as near, and in one of the two better."""
    ordered = sorted(points, key=lambda name: (points[name].seconds, points[name].error))
    found: set[Name] = set()
    least = math.inf
    for name in ordered:
        if points[name].error < least:
            found.add(name)
            least = points[name].error
    return found
