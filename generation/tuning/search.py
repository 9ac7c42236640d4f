"""Coarse to fine: levers on single steps, their combinations predicted, and the best of these on whole videos."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .budget import MIN_GAIN, Budget
from .prediction import Calibration, DenseRun, Prediction, front, predict
from .result import FOUND, NO_GAIN, NOTHING, Confirmed, Tried
from .space import Candidate, LayersLever, SparseLever, schedules
from .trajectory import Probe

if TYPE_CHECKING:
    from ...pipelines.guidance_cache.settings import GuidanceCache
    from ...pipelines.presets import Cache
    from .adapters import AdapterLever

TooBad = str
"""Why something could not be measured."""


DOUBTED = 2
"""Candidates that are measured in turns with dense before nothing is said to gain, or those nearer to dense than the
chosen to take too long."""

BORDERLINE = 0.5
"""Of what seems to miss a budget by so little (`Budget.excess`: 3 dB), videos are made until one misses it: predictions
are off by as much."""

UNKNOWN = 1.0
"""The same of a kind of lever that no video was made of yet: what others taught need not hold for it."""

UNKNOWN_DECIBEL = 6.0
"""As much in dB (`Budget.excess`)."""

NOT_BETTER = "no videos were made of it: by what the others taught, it would not have been better"


@dataclass(frozen=True)
class Measures:
    """What a search asks of the machine.

    Args:
        probe: a candidate with one lever -> its steps, or why it cannot be.
        confirm: a candidate -> whole videos with it, or why it cannot be.
        run: an adapter -> the dense run with it, or why it cannot be; None where no adapter is tried.
        turns: a candidate -> times as fast as dense, the two in turns; None where that is not measured.
        known: whether videos of a candidate were made before, so that `confirm` costs nothing.
        asked: told how many candidates this search, and those before it of the same request, had videos made of.
    """

    probe: Callable[[Candidate], Probe | TooBad]
    confirm: Callable[[Candidate], Confirmed | TooBad]
    run: Callable[[AdapterLever], DenseRun | TooBad] | None = None
    turns: Callable[[Candidate], tuple[float, ...]] | None = None
    known: Callable[[Candidate], bool] = lambda candidate: False
    asked: Callable[[int], None] = lambda count: None


@dataclass
class _Levers:
    """Levers that were measured on one run: the plain one, or that with an adapter.

    Args:
        adapter: of the run; None for the plain one.
        dense: the run.
        adapter_psnr: see `Prediction`.
        sparse, caches, layers, guidance: those that may gain, with their steps.
    """

    adapter: AdapterLever | None
    dense: DenseRun
    adapter_psnr: float = math.inf
    sparse: list[tuple[SparseLever, Probe]] = field(default_factory=list)
    caches: list[tuple[Cache, Probe]] = field(default_factory=list)
    layers: list[tuple[LayersLever, Probe]] = field(default_factory=list)
    guidance: list[tuple[GuidanceCache, Probe]] = field(default_factory=list)


@dataclass
class Search:
    """One search.

    Args:
        budget: to keep within.
        dense: the run without anything.
        measures: the machine.
        most: candidates of which whole videos are made, beside those that are known.
        apart: caches over steps and guidance caches are not put together, which the model refuses.
        already: how many of `most` an earlier search of the same request had.
        plan: told how many measurements there will be at the most, as far as is known.
        left_out: combinations that were predicted, and for which there was one as good; thousands, maybe.
        ran_out: whether another candidate was promising when the last of `most` had been made.
    """

    budget: Budget
    dense: DenseRun
    measures: Measures
    most: int = 6
    apart: bool = False
    already: int = 0
    plan: Callable[[int], None] = lambda count: None
    left_out: int = 0
    ran_out: bool = False
    _tried: dict[str, Tried] = field(default_factory=dict)

    def run(
        self,
        sparse: Sequence[SparseLever],
        caches: Sequence[Cache],
        layers: Sequence[LayersLever] = (),
        adapters: Sequence[AdapterLever] = (),
        guidance: Sequence[GuidanceCache] = (),
    ) -> tuple[str, Tried | None, tuple[Tried, ...]]:
        """Search.

        Args:
            sparse: the methods at their densities, the fewest pairs of each first.
            caches: at their thresholds.
            layers: in 8 bits, or compiled.
            adapters: for guidance in one pass or few steps: each makes another run, on which the other levers, those
                that gain on the plain one, are measured anew.
            guidance: leaves second passes out; of the plain run alone, since an adapter makes none.

        Returns:
            `FOUND`, `NO_GAIN` or `NOTHING`; the chosen, or the nearest; and everything that was tried.
        """
        on_each = len(sparse) + len(caches) + len(layers) + 1
        self.plan(on_each * (1 + len(adapters)) + len(guidance) + self.most)
        taught = Calibration()
        plain = self._probed(_Levers(None, self.dense), sparse, caches, layers)
        plain.guidance = self._probe_guidance(guidance)
        measured = [plain]
        gaining = [each for each, _ in plain.sparse], [each for each, _ in plain.caches]
        for adapter in adapters:
            levers = self._with_adapter(adapter, taught)
            if levers is not None:
                measured.append(self._probed(levers, *gaining, [each for each, _ in plain.layers]))
        return self._settled(self._pool(measured), taught)

    def _with_adapter(self, adapter: AdapterLever, taught: Calibration) -> _Levers | None:
        """The run with an adapter, and whole videos with it alone, from which all others with it are predicted.

        None where nothing with it can be within the budget.
        """
        alone = Candidate(adapter=adapter)
        assert self.measures.run is not None
        dense = self.measures.run(adapter)
        if isinstance(dense, str):
            self._drop(alone, dense)
            return None
        if (why := self._no_gain(dense.seconds)) is not None:
            self._drop(alone, why)
            return None
        made = self.measures.confirm(alone)
        if isinstance(made, str):
            self._drop(alone, made)
            return None
        predicted = Prediction(dense.seconds, 0.0, made.mean_psnr)
        taught.learn(alone.kind, predicted, made.median, made.mean_psnr)
        self._tried[alone.key] = Tried(alone, predicted, made)
        if self.budget.misses(None, made.mean_psnr, 0.0):
            return None  # of quality, which another lever only lowers
        return _Levers(adapter, dense, made.mean_psnr)

    def _probed(
        self, levers: _Levers, sparse: Sequence[SparseLever], caches: Sequence[Cache], layers: Sequence[LayersLever]
    ) -> _Levers:
        """The same with what was measured on its run."""
        levers.sparse = self._probe_sparse(levers, sparse)
        for cache in caches:
            probe = self._probe(Candidate(cache=cache, adapter=levers.adapter))
            if probe is not None:
                levers.caches.append((cache, probe))
        for how in layers:
            candidate = Candidate(layers=how, adapter=levers.adapter)
            probe = self._probe(candidate)
            if probe is not None and self._is_faster(candidate, levers, in_layers=probe):
                levers.layers.append((how, probe))
        return levers

    def _probe(self, candidate: Candidate) -> Probe | None:
        """The steps of a lever; None where it cannot be, which is noted."""
        probe = self.measures.probe(candidate)
        if isinstance(probe, str):
            self._drop(candidate, probe)
            return None
        return probe

    def _is_faster(self, candidate: Candidate, levers: _Levers, **probes: Probe) -> bool:
        """Whether a step with a lever is faster than without; where it is not, that is noted."""
        (probe,) = probes.values()
        if probe.step_seconds < (1 - MIN_GAIN) * levers.dense.step_seconds:
            return True
        slower = f"a step takes {_told(probe.step_seconds)}, a dense one {_told(levers.dense.step_seconds)}"
        all_probes = {"sparse": None, "cache": None} | probes
        predicted = predict(candidate, levers.dense, **all_probes, adapter_psnr=levers.adapter_psnr)
        self._drop(candidate, f"no gain: {slower}", predicted)
        return False

    def _probe_sparse(self, levers: _Levers, asked: Sequence[SparseLever]) -> list[tuple[SparseLever, Probe]]:
        """The levers that are faster than dense; of a method that is not at its lowest density, no other is tried."""
        found: list[tuple[SparseLever, Probe]] = []
        hopeless: dict[tuple, str] = {}
        for lever in asked:
            candidate = Candidate(sparse=lever, adapter=levers.adapter)
            family = (lever.method.name, lever.precision)
            if family in hopeless:
                self._drop(candidate, f"not measured: {hopeless[family]}")
                continue
            probe = self._probe(candidate)
            if probe is None:
                continue
            if self._is_faster(candidate, levers, sparse=probe):
                found.append((lever, probe))
            elif getattr(lever.method, "density", None):  # those that follow compute more
                hopeless[family] = f"{lever.label} is no faster than dense"
        return found

    def _probe_guidance(self, asked: Sequence[GuidanceCache]) -> list[tuple[GuidanceCache, Probe]]:
        """Those that leave a second pass out: a model may have its guidance in one, whatever the scale."""
        found: list[tuple[GuidanceCache, Probe]] = []
        for settings in asked:
            candidate = Candidate(guidance=settings)
            probe = self._probe(candidate)
            if probe is None:
                continue
            if probe.incomplete:
                found.append((settings, probe))
            else:
                self._drop(candidate, "no gain: no step has a second pass of guidance that it leaves out")
        return found

    def _no_gain(self, seconds: float) -> str | None:
        """Why a video that takes so long is of no use; None where it is faster than a dense one of the plain model."""
        if seconds < (1 - MIN_GAIN) * self.dense.seconds:
            return None
        return f"no gain: {_told(seconds)} a video is predicted, dense {_told(self.dense.seconds)}"

    def _pool(self, measured: Sequence[_Levers]) -> dict[str, tuple[Candidate, Prediction]]:
        """All combinations with their predictions, but those than which another of their kind is faster and nearer."""
        made = [each for levers in measured for each in _combined(levers, self.apart)]
        keep: set[int] = set()
        kinds: dict[Any, dict[int, Prediction]] = {}
        for number, (candidate, predicted) in enumerate(made):
            kinds.setdefault((candidate.adapter, candidate.kind), {})[number] = predicted
        for points in kinds.values():
            keep |= front(points)
        pool: dict[str, tuple[Candidate, Prediction]] = {}
        for number, (candidate, predicted) in enumerate(made):
            slow = self._no_gain(predicted.seconds)
            promising = number in keep and slow is None
            if not promising and not candidate.is_single:
                self.left_out += 1
                continue
            key = candidate.key  # takes longer than a prediction: of the few that are kept alone
            why = "another of its kind is predicted to be as fast and nearer"
            if promising:
                why = NOT_BETTER
                pool[key] = (candidate, predicted)
            self._tried[key] = Tried(candidate, predicted, why=slow or why)
        return pool

    def _confirm(self, left: dict[str, tuple[Candidate, Prediction]], taught: Calibration) -> None:
        """Whole videos of those that promise most, each choice with what the videos before it taught.

        They are taken out of `left`. What is known from searches within other budgets comes first, and costs nothing.
        """
        for key in [key for key, (candidate, _) in left.items() if self.measures.known(candidate)]:
            self._take(key, left, taught)
        while (key := self._next(left, taught)) is not None and self.already < self.most:
            self._take(key, left, taught)
            self.already += 1
            self.measures.asked(self.already)
        self.ran_out = key is not None
        used_up = f"no videos were made of it: confirm, which is {self.most}, was used up"
        for rest in left:
            self._tried[rest] = replace(self._tried[rest], why=used_up if self.ran_out else NOT_BETTER)

    def _take(self, key: str, left: dict[str, tuple[Candidate, Prediction]], taught: Calibration) -> None:
        candidate, predicted = left.pop(key)
        made = self.measures.confirm(candidate)
        if isinstance(made, str):
            self._tried[key] = Tried(candidate, predicted, why=made)
            return
        taught.learn(candidate.kind, predicted, made.median, made.mean_psnr)
        self._tried[key] = Tried(candidate, predicted, made)

    def _next(self, left: dict[str, tuple[Candidate, Prediction]], taught: Calibration) -> str | None:
        """The candidate to make videos with; None when no more is to be gained."""
        if not left:
            return None
        told = {}
        for key, (candidate, predicted) in left.items():
            seconds = taught.seconds(predicted.seconds)
            psnr = taught.psnr(candidate.kind, predicted)
            ratio = seconds / taught.seconds(self.dense.seconds)
            told[key] = (self.budget.excess(predicted.error, psnr, ratio), seconds, psnr)
        within = [key for key, (excess, *_) in told.items() if not excess]
        unknown = {key for key, (candidate, _) in left.items() if not taught.knows(candidate.kind)}
        best = self._best()
        if self.budget.wants_nearest:
            if not within:
                return None if best is not None else min(told, key=lambda key: told[key][0])
            if best is None:
                return max(within, key=lambda key: told[key][2])
            own = best.confirmed.mean_psnr
            nearer = [key for key in within if told[key][2] > own]
            # Of an unknown kind, one may be nearer than it seems.
            nearer = nearer or [key for key in within if key in unknown and told[key][2] + UNKNOWN_DECIBEL > own]
            return max(nearer, key=lambda key: told[key][2], default=None)
        if best is None:
            # Where nothing is expected to do, the nearest may all the same.
            return min(told, key=lambda key: (told[key][0], told[key][1]))
        dense = taught.seconds(self.dense.seconds)
        own = best.confirmed.ratio * dense if best.confirmed.gain else best.confirmed.median
        fastest = min(own, dense)  # the best so far may be slower
        gaining = [key for key in told if told[key][1] < (1 - MIN_GAIN) * fastest]
        if sure := [key for key in gaining if key in within]:
            return min(sure, key=lambda key: told[key][1])
        # Of these kinds, videos have told where the budget ends.
        known = {t.candidate.kind for t in self._tried.values() if t.confirmed is not None and self._over(t.confirmed)}
        near = [
            key
            for key in gaining
            if told[key][0] <= (UNKNOWN if key in unknown else BORDERLINE) and left[key][0].kind not in known
        ]
        return min(near, key=lambda key: told[key][0], default=None)

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

    def _settled(
        self, left: dict[str, tuple[Candidate, Prediction]], taught: Calibration
    ) -> tuple[str, Tried | None, tuple[Tried, ...]]:
        """The choice among whole videos, by turns with dense.

        The dense videos were made first, maybe days before: a machine that was busy then, or is now, would be taken for
        a gain, or hide one. So what is chosen is measured once more, and so are the best few before it is said that
        nothing gains, or that they take too long.
        """
        doubted = 0
        while True:
            self._confirm(left, taught)
            outcome, chosen, tried = self._choose()
            doubtful = chosen if outcome == FOUND and not chosen.confirmed.gain else None
            if doubtful is None and doubted < DOUBTED:
                doubtful = self._doubtful()
                doubted += 1
            if self.measures.turns is None or doubtful is None:
                return outcome, chosen, tried
            made = replace(doubtful.confirmed, gain=self.measures.turns(doubtful.candidate))
            self._tried[doubtful.candidate.key] = replace(doubtful, confirmed=made)

    def _doubtful(self) -> Tried | None:
        """What seems too slow by the dense times of another hour alone, and would be the choice if it is not."""
        best = self._best()
        if best is not None and not best.confirmed.gain:
            return best
        if not self.budget.wants_nearest:
            return None
        own = -math.inf if best is None else best.confirmed.mean_psnr
        late = [t for t in self._tried.values() if t.confirmed is not None and not t.confirmed.gain]
        late = [t for t in late if t.confirmed.mean_psnr > own and self._is_late_alone(t.confirmed)]
        return min(late, key=lambda t: t.confirmed.ratio, default=None)

    def _is_late_alone(self, made: Confirmed) -> bool:
        """Whether a bound of time is all that it misses."""
        return bool(self._over(made)) and not self.budget.misses(made.error, made.mean_psnr, 0.0)

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


def _combined(levers: _Levers, apart: bool) -> Iterator[tuple[Candidate, Prediction]]:
    """Every combination of levers that were measured on one run; `apart` as of `Search`."""
    plans = schedules(levers.dense.steps, levers.dense.layers)
    none: tuple[Any, Any] = (None, None)
    ways = [[none, *those] for those in (levers.layers, levers.caches, levers.guidance, levers.sparse)]
    for (how, in_layers), (cache, its), (guidance, left_out), (lever, probe) in itertools.product(*ways):
        if apart and cache is not None and guidance is not None:
            continue
        for schedule in plans if lever is not None else [None]:
            candidate = Candidate(lever, schedule, cache, how, levers.adapter, guidance)
            if candidate.kind or candidate.layers is not None:
                probes = (probe, its, in_layers, left_out)
                yield candidate, predict(candidate, levers.dense, *probes, adapter_psnr=levers.adapter_psnr)


def _seconds(tried: Tried) -> float:
    if tried.confirmed is not None:
        return tried.confirmed.median
    return math.inf if tried.predicted is None else tried.predicted.seconds


def _told(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
