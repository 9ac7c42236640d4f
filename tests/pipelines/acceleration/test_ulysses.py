"""Two processes that share the sequence of a video against one, with diffusers' `enable_parallelism`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig
from launched import launch
from shared_sequences import CASES, FIRST_LAYER, METHODS, build, gradient, run_sparse
from tiny_families import BUILDERS
from tiny_families import build as build_family

from vidaccel import accelerate
from vidaccel.pipelines.acceleration.rank_heads import assign
from vidaccel.pipelines.acceleration.support import support_rows

SCRIPT = Path(__file__).with_name("ulysses_processes.py")
RANKS = 2


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> list[dict]:
    """What each of two processes made of every case: they start once, which takes longer than the cases."""
    return launch(SCRIPT, RANKS, tmp_path_factory.mktemp("ulysses"))


@pytest.mark.parametrize("name, method", CASES, ids=lambda value: value)
def test_two_processes_make_what_one_makes(launched, name, method):
    one, two = run_sparse(build(name), method), launched[0][name, method]
    for process in launched:
        for ours, theirs in zip(process[name, method]["outs"], one["outs"], strict=True):
            if method == "radial" and name != "minimax_h3":  # whose dense passes differ by rounding, too
                assert ours.equal(theirs)
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    for ours, theirs in zip(two["records"], one["records"], strict=True):
        assert [ours[key] for key in ("layer", "step", "reason")] == [
            theirs[key] for key in ("layer", "step", "reason")
        ]
        numbers = [[record["density"], record["error"] or 0.0] for record in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-6)
    sparse = [record for record in two["records"] if not record["reason"]]
    assert sparse and all(record["density"] < 0.8 for record in sparse)


def busiest(record: dict) -> float:
    """Pairs of the busiest process over the mean of all."""
    pairs = record["details"]["rank_pairs"]
    return max(pairs) * len(pairs) / sum(pairs)


def test_heads_change_places_until_processes_compute_alike(launched):
    made = [process["wan", "tangent, probe"]["records"] for process in launched]
    records, others = ([record for record in records if not record["reason"]] for records in made)
    assert [r["details"]["rank_pairs"] for r in records] == [r["details"]["rank_pairs"] for r in others]
    first, *later = (busiest(record) for record in records)
    assert first > 1.3 and max(later) < 1.1
    (note,) = (note for note in launched[0]["wan", "tangent, probe"]["notes"] if "share the heads" in note)
    assert f"{first:.2f} times in the worst (layer 1 at step 0)" in note


def test_the_gradients_of_all_processes_add_up_to_that_of_one(launched):
    total = sum(process["gradient"] for process in launched)
    torch.testing.assert_close(total, gradient(build("wan"), "radial"), atol=1e-5, rtol=1e-4)
    assert total.abs().max() > 1e-3


def test_parallelism_comes_before_or_after_and_stays_when_the_handle_goes(launched):
    for made in (process["lifetime"] for process in launched):
        for name in ("dense, shared before", "removed, shared before", "removed, shared after"):
            assert all(a.equal(b) for a, b in zip(made[name], made["stock"], strict=True)), name
        for name in ("sparse, shared before", "sparse, compiled", "sparse, copied"):
            assert all(a.equal(b) for a, b in zip(made[name], made["sparse, shared after"], strict=True)), name
        assert not made["stock"][0].equal(made["sparse, shared after"][0])


def test_uneven_parts_come_together_and_apart_again(launched):
    assert [process["exchanged"] for process in launched] == [True] * RANKS


def test_what_cannot_be_shared_is_refused_by_all_processes(launched):
    for texts in (process["refusals"] for process in launched):
        assert "heads of attention, 3, cannot be shared by 2 processes" in texts["heads"]
        assert "75 tokens, which 2 processes cannot share evenly" in texts["tokens"]
        assert "heads of attention, 1, cannot be shared by 2 processes" in texts["heads, anything"]
        assert "ulysses_anything has no backward" in texts["gradient, anything"]
        assert "values of q are NaN or infinite in layer 1" in texts["nan in one head"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "name, config, why",
    [
        ("wan", ContextParallelConfig(ring_degree=2), "ring attention .ring_degree=2."),
        ("wan", ContextParallelConfig(ring_degree=2, ulysses_degree=2), "ring attention .ring_degree=2."),
        (
            "cogvideox_2b",
            ContextParallelConfig(ulysses_degree=2),
            "CogVideoXTransformer3DModel has no context-parallel",
        ),
    ],
)
def test_other_parallelism_is_refused(name, config, why, before):
    tiny = build_family(name)
    parallel = ParallelConfig(context_parallel_config=config)
    if before:
        tiny.model._parallel_config = parallel
        with pytest.raises(RuntimeError, match=why):
            accelerate(tiny.model, METHODS["radial"], schedule=FIRST_LAYER)
        return
    with accelerate(tiny.model, METHODS["radial"], schedule=FIRST_LAYER):
        tiny.model._parallel_config = parallel
        with pytest.raises(RuntimeError, match=why):
            tiny.run()


def test_the_table_says_what_diffusers_can_share():
    rows = {row["transformer"]: row["several GPUs"] for row in support_rows()}
    for name in BUILDERS:
        cls = type(build_family(name).model)
        assert (rows[cls.__name__] == "no") == (cls._cp_plan is None)


@pytest.mark.parametrize(
    "pairs, ranks, heads",
    [
        ([8, 1, 7, 2], 2, [[0, 1], [2, 3]]),
        ([5, 5, 5, 5], 2, [[0, 2], [1, 3]]),
        ([9, 1, 1], 2, [[1, 2], [0]]),  # the last process has what is left: one head of three
        ([1, 9, 1], 2, [[0, 2], [1]]),
    ],
)
def test_heads_are_given_so_that_processes_compute_alike(pairs, ranks, heads):
    order = assign(pairs, ranks)
    most = len(heads[0])
    assert sorted(order) == list(range(len(pairs)))
    assert [order[at : at + most] for at in range(0, len(order), most)] == heads
