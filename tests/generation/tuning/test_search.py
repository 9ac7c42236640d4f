"""What `tune` chooses, on a machine whose every number is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from vidaccel import Radial, Tangent, VideoLayout
from vidaccel.attention.schedule import DenseSchedule
from vidaccel.generation.errors import BadInput
from vidaccel.generation.tuning.adapters import AdapterLever
from vidaccel.generation.tuning.budget import Budget
from vidaccel.generation.tuning.prediction import Calibration, DenseRun, Prediction, front, predict
from vidaccel.generation.tuning.result import FOUND, NO_GAIN, NOTHING, Confirmed
from vidaccel.generation.tuning.search import Measures, Search
from vidaccel.generation.tuning.space import (
    LEVERS,
    Candidate,
    LayersLever,
    SparseLever,
    cache_levers,
    guidance_levers,
    layers_levers,
    quantize_levers,
    schedules,
    sparse_levers,
)
from vidaccel.generation.tuning.trajectory import Probe, probed_steps
from vidaccel.pipelines.guidance_cache import GuidanceCache
from vidaccel.pipelines.guidance_cache.differences import left_out
from vidaccel.pipelines.presets import Cache, Compile, Quantize

STEPS = 10
DENSE = DenseRun(STEPS, layers=4, step_seconds=1.0, other_seconds=2.0)


class Machine:
    """A machine where a sparse step takes `base + density` seconds, and a cache skips more the higher its threshold.

    A step of a method is off by `0.1 * (1 - density)`. PSNR follows the error of a run: `offset - 20 log10(error)`.
    """

    def __init__(self, base: float = 0.3, offset: float = 10.0, quantized: float = 0.8) -> None:
        self.base, self.offset, self.probed, self.confirmed = base, offset, [], []
        self.quantized, self.compiled, self.adapter_psnr = quantized, 0.8, 28.0
        self.second_passes = True
        self.turns: Callable[[Candidate], tuple[float, ...]] | None = None

    def run(self, adapter: AdapterLever) -> DenseRun | str:
        """One pass instead of two."""
        return replace(DENSE, step_seconds=0.5) if adapter.places != ("broken",) else "it does not fit"

    def probe(self, candidate: Candidate) -> Probe | str:
        self.probed.append(candidate.label)
        if (of_layers := candidate.layers) is not None:
            quantize = of_layers.quantize
            if quantize is not None and quantize.kind == "fp8":
                return "no fp8 here"
            steps = probed_steps(STEPS)
            taken = (1.0 if quantize is None else self.quantized) * (1.0 if candidate.adapter is None else 0.5)
            taken *= 1.0 if of_layers.compile is None else self.compiled if quantize is None else 0.5
            error = 1e-6 if quantize is None else 0.02
            return Probe(dict.fromkeys(steps, error), dict.fromkeys(steps, taken), dict.fromkeys(steps, 1.0))
        if candidate.guidance is not None:
            return seconds_left_out(candidate.guidance) if self.second_passes else seconds_left_out()
        if candidate.sparse is not None:
            density = candidate.sparse.method.density
            steps = probed_steps(STEPS)
            error = dict.fromkeys(steps, 0.1 * (1 - density))
            return Probe(error, dict.fromkeys(steps, self.base + density), dict.fromkeys(steps, 1.0))
        skipped = min(8, round(20 * candidate.cache.limit))
        computed = {step: float(not 1 <= step <= skipped) for step in range(STEPS)}
        return Probe(
            {step: 0.0 if computed[step] else candidate.cache.limit for step in range(STEPS)},
            {step: computed[step] for step in range(STEPS)},
            computed,
        )

    def confirm(self, candidate: Candidate) -> Confirmed:
        self.confirmed.append(candidate.label)
        own = candidate.adapter
        probes = [
            self.probe(Candidate(sparse=candidate.sparse, adapter=own)) if candidate.sparse else None,
            self.probe(Candidate(cache=candidate.cache, adapter=own)) if candidate.cache else None,
            self.probe(Candidate(layers=candidate.layers, adapter=own)) if candidate.layers else None,
            self.probe(Candidate(guidance=candidate.guidance)) if candidate.guidance else None,
        ]
        true = predict(candidate, DENSE if own is None else self.run(own), *probes)
        error = math.hypot(true.error, 0 if own is None else 10 ** ((self.offset - self.adapter_psnr) / 20))
        psnr = math.inf if error == 0 else min(85.0, self.offset - 20 * math.log10(error))  # of frames in bytes
        told = None if own is not None else true.error
        return Confirmed((true.seconds,) * 2, (DENSE.seconds,) * 2, (psnr,) * 2, told, 1, 1)

    def search(self, budget: Budget, sparse=(), caches=(), most: int = 6, apart: bool = False, **more):
        measures = Measures(self.probe, self.confirm, self.run, self.turns)
        found = Search(budget, DENSE, measures, most, apart).run(sparse, caches, **more)
        outcome, chosen, tried = found
        return outcome, chosen, {each.candidate.label: each for each in tried}


def seconds_left_out(settings: GuidanceCache | None = None) -> Probe:
    """A step without its second pass takes 0.6 s, and is off by 0.01 times `every`."""
    left = [False] * STEPS if settings is None else left_out(settings, [True] * STEPS)
    return Probe(
        {step: 0.01 * settings.every if out else 0.0 for step, out in enumerate(left)},
        {step: 0.6 if out else 1.0 for step, out in enumerate(left)},
        {step: 0.5 if out else 1.0 for step, out in enumerate(left)},
    )


def levers(*densities: float) -> list[SparseLever]:
    return [SparseLever(Tangent(density=density, schedule=DenseSchedule())) for density in densities]


def caches(*limits: float) -> list[Cache]:
    return [Cache("first_block", limit) for limit in limits]


def test_the_fastest_within_a_quality():
    machine = Machine()
    outcome, chosen, tried = machine.search(Budget(max_error=0.05), levers(0.2, 0.4, 0.6), caches(0.02, 0.05, 0.1))
    assert outcome == FOUND and chosen.confirmed.error <= 0.05 and not chosen.why
    # Nothing within the budget that was predicted is faster, in this world where predictions are true.
    others = [t for t in tried.values() if t.predicted is not None and t.predicted.error <= 0.05]
    assert chosen.predicted.seconds == min(t.predicted.seconds for t in others)
    assert len(machine.confirmed) < 6 and len(others) > 1 and all(t.why for t in others if t is not chosen)


def test_what_is_chosen_must_be_faster_in_turns_too():
    machine = Machine()
    _, first, _ = machine.search(Budget(max_error=0.05), caches=caches(0.02, 0.05, 0.1))
    timed = []

    def turns(candidate: Candidate) -> tuple[float, ...]:
        timed.append(candidate.label)
        return (0.85, 0.8) if candidate.key == first.candidate.key else (1.3, 1.2, 1.4)

    machine.turns = turns
    outcome, chosen, tried = machine.search(Budget(max_error=0.05), caches=caches(0.02, 0.05, 0.1))
    assert outcome == FOUND and chosen.candidate.key != first.candidate.key
    assert chosen.confirmed.gain == (1.3, 1.2, 1.4) and chosen.confirmed.ratio == pytest.approx(1 / 1.3)
    assert timed == [first.candidate.label, chosen.candidate.label]
    assert tried[first.candidate.label].confirmed.ratio == pytest.approx(1 / 0.825)

    machine.turns = lambda candidate: (0.9,)
    outcome, chosen, tried = machine.search(Budget(max_error=0.05), caches=caches(0.02, 0.05, 0.1))
    assert outcome == NO_GAIN and chosen is None and any("no gain" in t.why for t in tried.values())


def test_turns_hold_a_bound_of_time():
    machine = Machine()
    machine.turns = lambda candidate: (1.2,)
    outcome, *_ = machine.search(Budget(max_time_ratio=0.75), caches=caches(0.1, 0.2, 0.4))
    assert outcome == NOTHING
    machine.turns = lambda candidate: (1.5,)
    outcome, chosen, _ = machine.search(Budget(max_time_ratio=0.75), caches=caches(0.1, 0.2, 0.4))
    assert outcome == FOUND and chosen.confirmed.ratio == pytest.approx(1 / 1.5)


def test_too_slow_is_not_said_by_the_dense_times_of_another_hour():
    """The nearest seems to take too long beside what the machine did meanwhile; in turns it does not."""
    machine, timed = Machine(), []
    honest = machine.confirm

    def busy(candidate: Candidate) -> Confirmed:
        made = honest(candidate)
        return replace(made, seconds=tuple(s * (3 if candidate.cache.limit < 0.2 else 1) for s in made.seconds))

    machine.confirm = busy
    request = Budget(max_time_ratio=0.75), (), caches(0.15, 0.2, 0.4)
    outcome, chosen, _ = machine.search(*request)
    assert outcome == FOUND and chosen.candidate.cache.limit == 0.2

    def turns(candidate: Candidate) -> tuple[float, ...]:
        timed.append(candidate.cache.limit)
        return (1.5,)

    machine.turns = turns
    outcome, chosen, _ = machine.search(*request)
    assert outcome == FOUND and chosen.candidate.cache.limit == 0.15 and timed == [0.2, 0.15]
    # What is over another bound, too, is not timed, and of what takes too long in turns, too, no more than two are.
    timed.clear()
    assert machine.search(Budget(max_time_ratio=0.75, min_psnr=90), *request[1:])[0] == NOTHING and not timed
    machine.turns = lambda candidate: timed.append(candidate.cache.limit) or (1.1,)
    assert machine.search(*request)[0] == NOTHING and len(timed) == 3  # the chosen, and two that are doubted


def test_nothing_gains_is_not_said_by_the_dense_times_of_another_hour():
    machine = Machine()
    honest = machine.confirm

    def busy(candidate: Candidate) -> Confirmed:
        made = honest(candidate)
        return replace(made, seconds=tuple(2 * s for s in made.seconds))

    machine.confirm = busy
    outcome, *_ = machine.search(Budget(max_error=0.05), caches=caches(0.02, 0.05))
    assert outcome == NO_GAIN
    machine.turns = lambda candidate: (1.3,)
    outcome, chosen, _ = machine.search(Budget(max_error=0.05), caches=caches(0.02, 0.05))
    assert outcome == FOUND and chosen.confirmed.gain == (1.3,)


def test_videos_correct_what_errors_are_expected_to_mean():
    """The first guess is far off: where errors cost 14 dB more than guessed, the search comes back into the budget."""
    machine = Machine(offset=-6.0)
    outcome, chosen, tried = machine.search(Budget(min_psnr=30), caches=caches(*(0.002 * i for i in range(1, 60))))
    assert outcome == FOUND and chosen.confirmed.mean_psnr >= 30
    assert any("PSNR" in t.why for t in tried.values() if t.confirmed is not None)


def test_videos_are_made_of_what_seems_just_out_of_the_budget_and_is_faster():
    """A prediction is off by some dB: here whole videos of one cache are 2 dB nearer than its steps tell."""

    class Nearer(Machine):
        def confirm(self, candidate: Candidate) -> Confirmed:
            made = super().confirm(candidate)
            nearer = 2.0 if candidate.cache.limit == 0.2 else 0.0
            return replace(made, psnr=tuple(psnr + nearer for psnr in made.psnr))

    expected = Machine().confirm(Candidate(cache=caches(0.2)[0])).mean_psnr
    for above, chosen_limit in ((1.0, 0.2), (2.5, 0.1), (4.0, 0.1)):
        machine = Nearer()
        outcome, chosen, _ = machine.search(Budget(min_psnr=expected + above), caches=caches(0.1, 0.2))
        assert outcome == FOUND and chosen.candidate.cache.limit == chosen_limit
        assert len(machine.confirmed) == (1 if above > 3 else 2)  # far out of the budget none are made


def test_the_nearest_within_a_time():
    machine = Machine()
    outcome, chosen, tried = machine.search(Budget(max_time_ratio=0.8), levers(0.2, 0.4), caches(0.05, 0.1, 0.2))
    assert outcome == FOUND and chosen.confirmed.ratio <= 0.8
    within = [t for t in tried.values() if t.confirmed is not None and t.confirmed.ratio <= 0.8]
    assert chosen.confirmed.mean_psnr == max(t.confirmed.mean_psnr for t in within)


def test_a_method_that_is_slower_at_its_lowest_density_is_not_tried_further():
    machine = Machine(base=1.5)
    outcome, chosen, tried = machine.search(Budget(min_psnr=20), levers(0.2, 0.4, 0.6))
    assert (outcome, chosen) == (NO_GAIN, None) and machine.probed == ["tangent density 0.2"] and not machine.confirmed
    assert tried["tangent density 0.2"].why == "no gain: a step takes 1.70 s, a dense one 1.00 s"
    assert tried["tangent density 0.6"].why == "not measured: tangent density 0.2 is no faster than dense"


def test_nothing_within_the_budget_shows_the_nearest():
    machine = Machine()
    outcome, chosen, _ = machine.search(Budget(min_psnr=90), caches=caches(0.05, 0.1, 0.2), most=2)
    assert outcome == NOTHING and chosen.candidate.cache.limit == 0.05
    assert chosen.why.startswith("PSNR ") and "below 90" in chosen.why and len(machine.confirmed) == 2
    # A time that nothing reaches, where all is slower than dense.
    assert Machine(base=2.0).search(Budget(max_time_ratio=0.5), levers(0.2))[0] == NOTHING


def test_what_cannot_be_is_dropped_with_why():
    machine = Machine()
    machine.probe = lambda candidate: "the model refuses it"
    outcome, _, tried = machine.search(Budget(min_psnr=30), levers(0.2), caches(0.05))
    assert outcome == NO_GAIN and {t.why for t in tried.values()} == {"the model refuses it"}


def test_what_another_budget_had_made_costs_nothing_and_teaches():
    machine, asked = Machine(), []
    given = {"sparse": levers(0.2, 0.4, 0.6), "caches": caches(0.02, 0.05, 0.1)}
    first = machine.search(Budget(min_psnr=30), most=3, **given)[2]
    made = {each.candidate.key for each in first.values() if each.confirmed is not None}
    assert made
    measures = Measures(
        machine.probe, machine.confirm, machine.run, known=lambda each: each.key in made, asked=asked.append
    )
    machine.confirmed.clear()
    search = Search(Budget(min_psnr=34), DENSE, measures, 2)
    outcome, chosen, tried = search.run(given["sparse"], given["caches"])
    its = {each.candidate.key for each in tried if each.confirmed is not None}
    assert outcome == FOUND and chosen.confirmed.mean_psnr >= 34 and its & made
    assert asked == list(range(1, 1 + len(its - made))) and len(asked) <= 2
    # The same request again has no more of its own to make.
    again = Search(Budget(min_psnr=34), DENSE, measures, 2, already=2)
    found = again.run(given["sparse"], given["caches"])[2]
    assert {each.candidate.key for each in found if each.confirmed is not None} == its & made


def test_what_confirm_leaves_no_videos_for_says_so():
    given = {"sparse": levers(0.2, 0.4, 0.6), "caches": caches(0.02, 0.05, 0.1)}
    unmade = [t.why for t in Machine().search(Budget(min_psnr=90), most=1, **given)[2].values() if not t.confirmed]
    assert "no videos were made of it: confirm, which is 1, was used up" in unmade
    assert not any("what the others taught" in why for why in unmade)
    unmade = [t.why for t in Machine().search(Budget(min_psnr=30), most=20, **given)[2].values() if not t.confirmed]
    assert any("what the others taught" in why for why in unmade) and not any("used up" in why for why in unmade)


def test_layers_in_8_bits_are_taken_where_they_are_faster():
    eights = layers_levers(quantize_levers("normal"), None)
    machine = Machine()
    outcome, chosen, tried = machine.search(Budget(max_error=0.1), levers(0.2), caches(0.05), layers=eights)
    assert outcome == FOUND and chosen.candidate.layers == LayersLever(Quantize("int8", True))
    assert chosen.candidate.sparse is not None  # what the two save adds up
    assert tried["layers in fp8"].why == "no fp8 here"
    slow = Machine(quantized=1.2)
    outcome, chosen, tried = slow.search(Budget(max_error=0.1), levers(0.2), layers=eights)
    assert chosen.candidate.layers is None and all("int8;" not in label for label in tried)
    assert tried["layers in int8"].why == "no gain: a step takes 1.20 s, a dense one 1.00 s"


def test_compiled_blocks_are_taken_where_they_are_faster_alone_and_under_8_bits():
    machine = Machine()
    compiled = layers_levers([], Compile())
    outcome, chosen, _ = machine.search(Budget(max_error=0.07), levers(0.3), layers=compiled)
    assert outcome == FOUND and chosen.candidate.layers == LayersLever(compile=Compile())
    assert chosen.candidate.sparse is not None  # what the two save adds up
    assert chosen.candidate.preset().compile == Compile() and chosen.candidate.label.startswith(
        "compiled; tangent density 0.3"
    )
    slow = Machine()
    slow.compiled = 1.1
    assert slow.search(Budget(max_error=0.1), layers=compiled)[0] == NO_GAIN
    # 8 bits that are slower by themselves, and faster than compiled blocks where they are compiled.
    machine = Machine(quantized=1.2)
    both = layers_levers(quantize_levers("normal")[:1], Compile())
    assert [Candidate(layers=each).label for each in both] == ["compiled", "layers in int8", "layers in int8; compiled"]
    outcome, chosen, tried = machine.search(Budget(max_error=0.1), layers=both)
    assert outcome == FOUND and chosen.candidate.layers == LayersLever(Quantize("int8", True), Compile())
    assert tried["layers in int8"].why.startswith("no gain")


def test_compiled_blocks_teach_nothing_of_errors():
    taught = Calibration()
    candidate = Candidate(layers=LayersLever(compile=Compile()))
    taught.learn(candidate.kind, Prediction(1.0, 1e-6), 1.0, 85.0)  # what frames in bytes leave of the rounding
    assert not taught.knows("first_block") and taught.seconds(2.0) == 2.0
    assert taught.psnr("first_block", Prediction(1.0, 0.1)) == Calibration().psnr("first_block", Prediction(1.0, 0.1))
    assert Candidate(cache=caches(0.1)[0], layers=candidate.layers).kind == "first_block"


def test_an_adapter_is_another_run_that_other_levers_are_measured_on():
    few = AdapterLever(("/a/gft.safetensors",))
    broken = AdapterLever(("broken",))
    machine = Machine()
    asked = {
        "caches": caches(0.05),
        "layers": layers_levers(quantize_levers("normal")[:1], None),
        "adapters": [few, broken],
    }
    outcome, chosen, tried = machine.search(Budget(min_psnr=24), **asked)
    assert outcome == FOUND and chosen.candidate.adapter == few and chosen.candidate.layers is not None
    assert tried["gft (one pass)"].confirmed.median == 7.0 and tried["broken (one pass)"].why == "it does not fit"
    assert {"gft (one pass); layers in int8", "gft (one pass); first_block 0.05"} <= set(machine.probed)
    # By itself below the budget: nothing is added to it.
    machine = Machine()
    machine.adapter_psnr = 20.0
    outcome, chosen, tried = machine.search(Budget(min_psnr=24), **asked)
    assert outcome == FOUND and chosen.candidate.adapter is None
    assert tried["gft (one pass)"].why == "PSNR 20.0 dB below 24"
    assert not [label for label in machine.probed if label.startswith("gft")]


def test_second_passes_are_left_out_beside_other_levers():
    few = AdapterLever(("/a/gft.safetensors",))
    machine = Machine()
    asked = {
        "layers": layers_levers(quantize_levers("normal"), None),
        "adapters": [few],
        "guidance": guidance_levers("normal"),
    }
    outcome, chosen, tried = machine.search(Budget(max_error=0.12), levers(0.2), caches(0.05), most=9, **asked)
    assert outcome == FOUND and chosen.candidate.guidance is not None and chosen.candidate.sparse is not None
    assert chosen.predicted.seconds < tried["layers in int8; tangent density 0.2"].predicted.seconds
    assert {f"guidance every {every}" for every in (2, 3, 4)} <= set(machine.probed)
    # An adapter makes no second pass, so nothing is measured or predicted of the two.
    assert any(label.startswith("gft (one pass); ") for label in tried)
    assert not [label for label in (*tried, *machine.probed) if "one pass" in label and "guidance every" in label]
    both = [label for label in tried if "first_block" in label and "guidance every" in label]
    apart = machine.search(Budget(max_error=0.12), levers(0.2), caches(0.05), apart=True, **asked)[2]
    assert both and not [label for label in apart if "first_block" in label and "guidance every" in label]


def test_guidance_without_a_second_pass_is_dropped():
    machine = Machine()
    machine.second_passes = False
    outcome, _, tried = machine.search(Budget(max_error=0.1), levers(0.2), guidance=guidance_levers("quick"))
    assert tried["guidance every 3"].why == "no gain: no step has a second pass of guidance that it leaves out"
    assert outcome == FOUND and not [label for label in machine.confirmed if "guidance" in label]


# -- predictions -------------------------------------------------------------------------------------------------------


def test_a_prediction_is_the_sum_of_its_steps():
    probe = Probe(
        {0: 0.1, 9: 0.3}, {0: 5.0, 9: 0.5}, {0: 1.0, 9: 1.0}, ((0.4, 0.4), (0.3, 0.3), (0.0, 0.0), (0.0, 0.0))
    )
    lever = levers(0.2)[0]
    all_sparse = predict(Candidate(lever, DenseSchedule()), DENSE, probe, None)
    assert all_sparse.seconds == pytest.approx(2 + 10 * 0.5)  # the first step, which made ready, is not counted
    errors = [0.1 + 0.2 * step / 9 for step in range(10)]
    assert all_sparse.error == pytest.approx(math.sqrt(sum(e * e for e in errors) / 10))
    kept = predict(Candidate(lever, DenseSchedule(first_steps=2, last_steps=1)), DENSE, probe, None)
    assert kept.seconds == pytest.approx(2 + 3 + 7 * 0.5)
    assert kept.error == pytest.approx(math.sqrt(sum(e * e for e in errors[2:-1]) / 10))
    # The meter saw 0.5 in all layers and 0.3 without the first.
    layer = predict(Candidate(lever, DenseSchedule(first_layers=1)), DENSE, probe, None)
    assert layer.error == pytest.approx(all_sparse.error * 0.6)
    assert layer.seconds == pytest.approx(2 + 10 * (0.25 + 0.75 * 0.5))


def test_a_cache_and_a_method_share_the_steps():
    cache = Probe(dict.fromkeys(range(10), 0.0) | {4: 0.2, 5: 0.2}, dict.fromkeys(range(10), 1.0) | {4: 0.1, 5: 0.1},
                  dict.fromkeys(range(10), 1.0) | {4: 0.0, 5: 0.0})  # fmt: skip
    probe = Probe(dict.fromkeys(range(10), 0.1), dict.fromkeys(range(10), 0.5), dict.fromkeys(range(10), 1.0))
    candidate = Candidate(levers(0.2)[0], DenseSchedule(first_steps=5), Cache("first_block"))
    both = predict(candidate, DENSE, probe, cache)
    # Steps 0 to 4 stay dense, and a step that is kept is not skipped; 5 is skipped, 6 to 9 are sparse.
    assert both.seconds == pytest.approx(2 + 5 * 1.0 + 0.1 + 4 * 0.5)
    assert both.error == pytest.approx(math.sqrt((0.2**2 + 4 * 0.1**2) / 10))


def test_8_bits_hold_in_steps_that_stay_dense_too():
    eight = Probe({0: 0.1, 9: 0.1}, {0: 5.0, 9: 0.8}, {0: 1.0, 9: 1.0})
    probe = Probe(dict.fromkeys(range(10), 0.2), dict.fromkeys(range(10), 0.5), dict.fromkeys(range(10), 1.0))
    candidate = Candidate(levers(0.2)[0], DenseSchedule(first_steps=4), layers=LayersLever(Quantize("int8", True)))
    both = predict(candidate, DENSE, probe, None, eight)
    assert both.seconds == pytest.approx(2 + 4 * 0.8 + 6 * 0.3)  # attention saves 0.5, the layers 0.2
    assert both.error == pytest.approx(math.sqrt(0.1**2 + 0.6 * 0.2**2))


def test_what_is_left_of_a_step_without_its_second_pass():
    """Of ten steps, 0, 1, 4 and 7 make both passes."""
    settings = GuidanceCache(3, first_steps=2)
    left = seconds_left_out(settings)
    alone = predict(Candidate(guidance=settings), DENSE, None, None, guidance=left)
    assert left.incomplete == [2, 3, 5, 6, 8, 9] and alone.seconds == pytest.approx(2 + 4 + 6 * 0.6)
    assert alone.error == pytest.approx(math.sqrt(0.6) * 0.03)
    # Both passes of a step are faster with other levers, and so is the one that is left; layers in 8 bits save 0.2,
    # and sparse attention 0.5 but for the four steps that it leaves dense, which make both: 6 and 9 are the others.
    eight = Probe({0: 0.1, 9: 0.1}, {0: 0.8, 9: 0.8}, {0: 1.0, 9: 1.0})
    sparse = Probe(dict.fromkeys(range(10), 0.2), dict.fromkeys(range(10), 0.5), dict.fromkeys(range(10), 1.0))
    schedule = DenseSchedule(first_steps=4)
    candidate = Candidate(levers(0.2)[0], schedule, layers=LayersLever(Quantize("int8", True)), guidance=settings)
    more = predict(candidate, DENSE, sparse, None, eight, left)
    assert more.seconds == pytest.approx(2 + 4 * 0.8 + 2 * 0.3 + 4 * 0.6 * 0.3)
    assert more.error == pytest.approx(math.sqrt(0.1**2 + 0.6 * 0.2**2 + 0.4 * 0.03**2))


def test_steps_that_a_cache_skips_have_no_second_pass():
    """A cache that skips 2, 4, 5 and 7 moves those that make both passes: 0, 1, 6 and 9."""
    settings, skipped = GuidanceCache(3, first_steps=2), (2, 4, 5, 7)
    cache = Probe(
        {step: 0.2 if step in skipped else 0.0 for step in range(10)},
        {step: 0.1 if step in skipped else 1.0 for step in range(10)},
        {step: float(step not in skipped) for step in range(10)},
    )
    candidate = Candidate(cache=Cache("first_block"), guidance=settings)
    both = predict(candidate, DENSE, None, cache, guidance=seconds_left_out(settings))
    assert both.seconds == pytest.approx(2 + 4 * 1.0 + 2 * 0.6 + 4 * 0.6 * 0.1)
    assert both.error == pytest.approx(math.sqrt(0.4 * 0.2**2 + 0.6 * 0.03**2))


def test_steps_that_stay_dense_make_both_passes():
    """As they do in the preset: with four dense ones at the start and two at the end, 4, 5 and 7 make one."""
    settings, schedule = GuidanceCache(3, first_steps=2), DenseSchedule(first_steps=4, last_steps=2)
    sparse = Probe({0: 0.0}, {0: 1.0}, {0: 1.0})
    candidate = Candidate(levers(0.2)[0], schedule, guidance=settings)
    made = predict(candidate, DENSE, sparse, None, guidance=seconds_left_out(settings))
    assert made.seconds == pytest.approx(2 + 7 * 1.0 + 3 * 0.6)


def test_calibration_learns_by_kind():
    taught = Calibration()
    taught.learn("svg2", Prediction(10.0, 0.1), 12.0, 30.0)
    assert taught.psnr("svg2", Prediction(1.0, 0.01)) == pytest.approx(50.0)
    assert taught.seconds(5.0) == pytest.approx(6.0)
    taught.learn("first_block", Prediction(10.0, 0.1), 12.0, 20.0)
    assert taught.psnr("first_block", Prediction(1.0, 0.1)) == pytest.approx(20.0)
    assert taught.psnr("svg2", Prediction(1.0, 0.1)) == pytest.approx(30.0)
    assert taught.psnr("svg2", Prediction(1.0, 0.0)) == math.inf


def test_a_kind_without_videos_is_not_known_by_those_of_another():
    taught = Calibration()
    assert not taught.knows("svg2") and taught.psnr("svg2", Prediction(1.0, 0.1)) == pytest.approx(28.0)
    for psnr in (10.0, 10.0, 10.0):
        taught.learn("first_block", Prediction(10.0, 0.1), 10.0, psnr)
    taught.learn("sparge", Prediction(10.0, 0.1), 10.0, 30.0)
    assert taught.knows("first_block") and not taught.knows("svg2") and not taught.knows("")
    # A guess between the kinds, of which each counts once, however many videos it has.
    assert taught.psnr("svg2", Prediction(1.0, 0.1)) == pytest.approx(20.0)
    # A lever that it shares with a kind is known.
    assert taught.knows("int8+sparge") and taught.psnr("int8+sparge", Prediction(1.0, 0.1)) == pytest.approx(30.0)


class OneKindIsFarOff(Machine):
    """Videos with a cache are 7 dB farther from dense than those of a method with the same error of a step."""

    def confirm(self, candidate: Candidate) -> Confirmed:
        made = super().confirm(candidate)
        return made if candidate.cache is None else replace(made, psnr=tuple(p - 7.0 for p in made.psnr))


def test_a_kind_is_not_left_out_by_what_another_taught(monkeypatch):
    """The cache is tried first and taught that errors cost 7 dB more than they do with the method."""
    monkeypatch.setattr("vidaccel.generation.tuning.search.schedules", lambda *_: [DenseSchedule()])
    machine = OneKindIsFarOff(base=0.6)
    outcome, chosen, _ = machine.search(Budget(min_psnr=29), levers(0.2), caches(0.15))
    assert machine.confirmed[:2] == ["first_block 0.15", "tangent density 0.2"] and outcome == FOUND
    assert chosen.candidate.kind == "tangent" and chosen.confirmed.mean_psnr > 29


def test_the_nearest_may_be_of_a_kind_without_videos():
    machine = OneKindIsFarOff(base=0.4)
    outcome, chosen, tried = machine.search(Budget(max_time_ratio=0.9), levers(0.2), caches(0.05, 0.1))
    within = [t for t in tried.values() if t.confirmed is not None and t.confirmed.ratio <= 0.9]
    assert outcome == FOUND and {"tangent", "first_block"} <= {t.candidate.kind for t in within}
    assert chosen.confirmed.mean_psnr == max(t.confirmed.mean_psnr for t in within)


def test_what_an_adapter_and_what_others_change_adds_up():
    taught = Calibration()
    taught.learn("svg2", Prediction(10.0, 0.1), 12.0, 30.0)
    assert taught.psnr("", Prediction(1.0, 0.0, 33.0)) == pytest.approx(33.0)
    assert taught.psnr("svg2", Prediction(1.0, 0.1, 30.0)) == pytest.approx(30.0 - 10 * math.log10(2))
    # Learnt from a video with an adapter is what the lever adds to it.
    other = Calibration()
    other.learn("svg2", Prediction(10.0, 0.1, 30.0), 12.0, 30.0 - 10 * math.log10(2))
    assert other.psnr("svg2", Prediction(1.0, 0.1)) == pytest.approx(30.0)
    # A video that is nearer with the lever than without teaches nothing of it.
    other = Calibration()
    other.learn("svg2", Prediction(10.0, 0.1, 30.0), 12.0, 31.0)
    assert other.psnr("svg2", Prediction(1.0, 0.1)) == Calibration().psnr("svg2", Prediction(1.0, 0.1))


def test_the_front():
    points = {"a": Prediction(1, 0.3), "b": Prediction(2, 0.2), "c": Prediction(2.5, 0.25), "d": Prediction(1, 0.4)}
    assert front(points) == {"a", "b"}


# -- the space ---------------------------------------------------------------------------------------------------------


def test_levers_that_a_size_does_not_allow_are_told():
    import torch

    made, refused = sparse_levers(("radial", "svg2"), VideoLayout(3, 4, 4), torch.device("cpu"), "quick")
    assert {lever.method.name for lever in made} == {"svg2"} and all(
        not lever.method.schedule.first_steps for lever in made
    )
    assert set(refused) == {"radial density 0.2", "radial density 0.4"}
    assert "cannot reach" in refused["radial density 0.2"]
    made, refused = sparse_levers(("tangent",), VideoLayout(3, 4, 4), torch.device("cpu"), "thorough")
    labels = {lever.label for lever in made}
    assert {"tangent tolerance 0.05", "tangent tolerance 0.1", "tangent density 0.4"} <= labels
    assert {"tangent density 0.05", "tangent density 0.1"} <= set(refused) and not labels & set(refused)


def test_caches_and_schedules():
    names = [cache.name for cache in cache_levers(("first_block", "magcache", "cache_dit"), "quick")]
    assert set(names) == {"first_block", "cache_dit"}  # MagCache without ratios is none
    assert cache_levers(("magcache",), "normal", [1.0, 0.9])[0].settings["mag_ratios"] == [1.0, 0.9]
    assert len({str(each) for each in schedules(4, 2)}) == len(schedules(4, 2)) > 1
    assert all(sum(each.steps_of(50)) <= 16 for each in schedules(50, 30))


def test_candidates_have_names_and_keys_of_their_own():
    one = Candidate(levers(0.2)[0], DenseSchedule(first_steps=2), Cache("first_block", 0.1))
    assert (
        one.label == "tangent density 0.2; dense: 2 first steps; first_block 0.1" and one.kind == "tangent+first_block"
    )
    others = [Candidate(levers(0.3)[0], one.schedule, one.cache), Candidate(one.sparse, one.schedule), Candidate()]
    others += [Candidate(layers=each) for each in layers_levers([Quantize("int8")], Compile())]
    others += [Candidate(layers=LayersLever(Quantize("int8", activations))) for activations in (True, False)]
    others += [Candidate(adapter=AdapterLever(("/a/b.safetensors",), 4, digest)) for digest in ("1", "2")]
    others += [Candidate(guidance=GuidanceCache(every)) for every in (2, 3)]
    others += [Candidate(one.sparse, one.schedule, one.cache, guidance=GuidanceCache(2))]
    assert len({each.key for each in [one, *others]}) == 13
    assert others[-2].label == "guidance every 3"
    assert others[-2].kind == "guidance" and others[-2].is_single and not others[-1].is_single
    assert others[-1].label == f"{one.label}; guidance every 2" and others[-1].kind == f"{one.kind}+guidance"
    assert others[-1].preset().guidance_cache == GuidanceCache(2) and others[-1].preset().cache == one.cache
    assert others[4].label == "layers in int8, weights alone" and others[4].kind == "int8" and others[4].is_single
    assert others[5].label == "layers in int8, weights alone; compiled" and others[5].is_single
    assert one.key == Candidate(levers(0.2)[0], DenseSchedule(first_steps=2), Cache("first_block", 0.1)).key
    assert Candidate(SparseLever(Radial())).preset().method == Radial()


def test_second_passes_are_tried_more_finely_with_more_effort():
    assert "guidance" in LEVERS
    made = {effort: [each.every for each in guidance_levers(effort)] for effort in ("quick", "normal", "thorough")}
    assert made == {"quick": [3], "normal": [2, 3, 4], "thorough": [2, 3, 4, 6]}


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_budgets_add_up():
    budget = Budget(max_error=0.1, min_psnr=30)
    assert budget.excess(0.1, 30.0, 5.0) == 0 and budget.misses(0.1, 30.0, 5.0) == []
    assert budget.excess(0.2, 30.0, 1.0) == pytest.approx(1.0) and budget.excess(0.1, 23.98, 1.0) == pytest.approx(1.0)
    assert budget.misses(0.2, 20.0, 1.0) == ["error 0.2 above 0.1", "PSNR 20.0 dB below 30"]
    assert not budget.wants_nearest and Budget(max_time_ratio=0.5).wants_nearest


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({}, r"^min_psnr is needed, or another bound\. Give max_error, min_psnr or max_time_ratio\.$"),
        ({"max_error": 0}, r"^max_error is 0: it must be above 0"),
        ({"max_error": 1.5}, r"^max_error is 1\.5: .*at most 1"),
        ({"min_psnr": -3}, r"^min_psnr is -3: it must be above 0 and at most 100 dB"),
        ({"max_time_ratio": 1.0}, r"^max_time_ratio is 1\.0: it must be between 0 and 1"),
        ({"min_psnr": math.nan}, r"^min_psnr is nan: it must be a finite number"),
        ({"min_psnr": True}, r"^min_psnr is True: it must be a finite number"),
    ],
)
def test_budgets_that_are_none(bounds, message):
    with pytest.raises(BadInput, match=message):
        Budget(**bounds)
