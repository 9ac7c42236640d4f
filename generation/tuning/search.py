"""Coarse to fine: levers on single steps, their combinations predicted, and the best of these on whole videos."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .budget import MIN_GAIN, Budget
from .prediction import Calibration, DenseRun, Prediction, front, predict
from .result import FOUND, NO_GAIN, NOTHING, Confirmed, Tried
from .space import Candidate, SparseLever, schedules
from .trajectory import Probe

TooBad = str
"""Why something could not be measured."""


@dataclass(frozen=True)
class Measures:
    """What a search asks of the machine.

    Args:
        probe: a candidate with one lever -> its steps, or why it cannot be.
        confirm: a candidate -> whole videos with it, or why it cannot be.
    """

    probe: Callable[[Candidate], Probe | TooBad]
    confirm: Callable[[Candidate], Confirmed | TooBad]


@dataclass
class Search:
    """One search.

    Args:
        budget: to keep within.
        dense: the run without anything.
        measures: the machine.
        most: candidates of which whole videos are made.
        plan: told how many measurements there will be at the most, as far as is known.
        left_out: combinations that were predicted, and for which there was one as good; thousands, maybe.
    """

    budget: Budget
    dense: DenseRun
    measures: Measures
    most: int = 6
    plan: Callable[[int], None] = lambda count: None
    left_out: int = 0
    _tried: dict[str, Tried] = field(default_factory=dict)

    def run(self, sparse: Sequence[SparseLever], caches: Sequence) -> tuple[str, Tried | None, tuple[Tried, ...]]:
        """Search.

        Args:
            sparse: the methods at their densities, the fewest pairs of each first.
            caches: at their thresholds.

        Returns:
            `FOUND`, `NO_GAIN` or `NOTHING`; the chosen, or the nearest; and everything that was tried.
        """
        self.plan(len(sparse) + len(caches) + self.most)
        alone = self._probe_sparse(sparse)
        of_cache = {}
        for cache in caches:
            candidate = Candidate(cache=cache)
            probe = self.measures.probe(candidate)
            if isinstance(probe, str):
                self._drop(candidate, probe)
            else:
                of_cache[candidate.key] = (candidate, probe)
        pool = self._pool(alone, list(of_cache.values()))
        self._confirm(pool)
        return self._choose()

    def _probe_sparse(self, levers: Sequence[SparseLever]) -> list[tuple[SparseLever, Probe]]:
        """The levers that are faster than dense; of a method that is not at its lowest density, no other is tried."""
        found: list[tuple[SparseLever, Probe]] = []
        hopeless: dict[tuple, str] = {}
        for lever in levers:
            candidate = Candidate(sparse=lever)
            family = (lever.method.name, lever.precision)
            if family in hopeless:
                self._drop(candidate, f"not measured: {hopeless[family]}")
                continue
            probe = self.measures.probe(candidate)
            if isinstance(probe, str):
                self._drop(candidate, probe)
                continue
            predicted = predict(candidate, self.dense, probe, None)
            if probe.step_seconds >= (1 - MIN_GAIN) * self.dense.step_seconds:
                slower = f"a step takes {_told(probe.step_seconds)}, a dense one {_told(self.dense.step_seconds)}"
                self._drop(candidate, f"no gain: {slower}", predicted)
                if getattr(lever.method, "density", None):  # those that follow compute more
                    hopeless[family] = f"{lever.label} is no faster than dense"
                continue
            found.append((lever, probe))
        return found

    def _pool(
        self, sparse: Sequence[tuple[SparseLever, Probe]], caches: Sequence[tuple[Candidate, Probe]]
    ) -> dict[str, tuple[Candidate, Prediction]]:
        """All combinations with their predictions, but those than which another of their kind is faster and nearer."""
        plans = schedules(self.dense.steps, self.dense.layers)
        of_cache = [(candidate.cache, probe) for candidate, probe in caches]
        made: dict[str, tuple[Candidate, Prediction]] = {}
        for cache, its in [(None, None), *of_cache]:
            for lever, probe in [(None, None), *sparse]:
                for schedule in plans if lever is not None else [None]:
                    candidate = Candidate(lever, schedule, cache)
                    if candidate.kind:
                        made[candidate.key] = (candidate, predict(candidate, self.dense, probe, its))
        keep: set[str] = set()
        for kind in {candidate.kind for candidate, _ in made.values()}:
            keep |= front({key: p for key, (c, p) in made.items() if c.kind == kind})
        for key, (candidate, predicted) in made.items():
            why = "not needed" if key in keep else "another of its kind is predicted to be as fast and nearer"
            if predicted.seconds >= (1 - MIN_GAIN) * self.dense.seconds:
                keep.discard(key)
                why = f"no gain: {_told(predicted.seconds)} a video is predicted, dense {_told(self.dense.seconds)}"
            if key in keep or candidate.is_single:
                self._tried[key] = Tried(candidate, predicted, why=why)
            else:
                self.left_out += 1
        return {key: made[key] for key in made if key in keep}

    def _confirm(self, pool: dict[str, tuple[Candidate, Prediction]]) -> None:
        """Whole videos of those that promise most, each choice with what the videos before it taught."""
        taught = Calibration()
        left = dict(pool)
        for _ in range(self.most):
            key = self._next(left, taught)
            if key is None:
                break
            candidate, predicted = left.pop(key)
            made = self.measures.confirm(candidate)
            if isinstance(made, str):
                self._tried[key] = Tried(candidate, predicted, why=made)
                continue
            taught.learn(candidate.kind, predicted, made.median, made.mean_psnr)
            self._tried[key] = Tried(candidate, predicted, made)

    def _next(self, left: dict[str, tuple[Candidate, Prediction]], taught: Calibration) -> str | None:
        """The candidate to make videos with; None when no more is to be gained."""
        if not left:
            return None
        told = {}
        for key, (candidate, predicted) in left.items():
            seconds = taught.seconds(predicted.seconds)
            psnr = taught.psnr(candidate.kind, predicted.error)
            ratio = seconds / taught.seconds(self.dense.seconds)
            told[key] = (self.budget.excess(predicted.error, psnr, ratio), seconds, psnr)
        within = [key for key, (excess, *_) in told.items() if not excess]
        best = self._best()
        if not within:
            # Nothing is expected to do: the nearest may all the same, unless something does already.
            return None if best is not None else min(told, key=lambda key: told[key][0])
        if self.budget.wants_nearest:
            key = max(within, key=lambda key: told[key][2])
            return None if best is not None and told[key][2] <= best.confirmed.mean_psnr else key
        key = min(within, key=lambda key: told[key][1])
        return None if best is not None and told[key][1] >= (1 - MIN_GAIN) * best.confirmed.median else key

    def _best(self) -> Tried | None:
        """Of those with videos within the budget: the fastest, or with a bound of time the nearest to dense."""
        own = [t for t in self._tried.values() if t.confirmed is not None and not self._over(t.confirmed)]
        if not own:
            return None
        if self.budget.wants_nearest:
            return max(own, key=lambda t: (t.confirmed.mean_psnr, -t.confirmed.ratio))
        return min(own, key=lambda t: t.confirmed.ratio)

    def _over(self, made: Confirmed) -> float:
        return self.budget.excess(made.error, made.mean_psnr, made.ratio)

    def _choose(self) -> tuple[str, Tried | None, tuple[Tried, ...]]:
        best = self._best()
        gains = best is not None and best.confirmed.ratio < 1 - MIN_GAIN
        confirmed = {key: t for key, t in self._tried.items() if t.confirmed is not None}
        for key, t in confirmed.items():
            misses = self.budget.misses(t.confirmed.error, t.confirmed.mean_psnr, t.confirmed.ratio)
            why = ", ".join(misses)
            if t is best:
                why = "" if gains else f"no gain: {t.confirmed.ratio:.2f} of the dense time"
            elif not misses:
                why = "farther from dense" if self.budget.wants_nearest else "slower"
            self._tried[key] = Tried(t.candidate, t.predicted, t.confirmed, why)
        order = {True: 0, False: 1}
        told = sorted(self._tried.values(), key=lambda t: (order[t.confirmed is not None], _seconds(t)))
        if gains:
            return FOUND, next(t for t in told if t.confirmed is not None and not t.why), tuple(told)
        if best is not None or not confirmed:
            # Levers that are slower than dense were not confirmed: that answers it, unless time alone was asked for.
            outcome = NOTHING if best is None and self.budget.wants_nearest else NO_GAIN
            return outcome, None, tuple(told)
        nearest = min(confirmed, key=lambda key: self._over(confirmed[key].confirmed))
        return NOTHING, self._tried[nearest], tuple(told)

    def _drop(self, candidate: Candidate, why: str, predicted: Prediction | None = None) -> None:
        self._tried[candidate.key] = Tried(candidate, predicted, why=why)


def _seconds(tried: Tried) -> float:
    if tried.confirmed is not None:
        return tried.confirmed.median
    return math.inf if tried.predicted is None else tried.predicted.seconds


def _told(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
