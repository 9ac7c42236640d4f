"""Steps, branches and what stays dense, from the numbers a sampler gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vidaccel import DenseSchedule
from vidaccel.attention import StepInfo
from vidaccel.nodes.native.sampling import DensePart, branches_of, parse_layers, step_of


def shifted(percent: float, shift: float = 8.0) -> float:
    """ComfyUI's `percent_to_sigma` of a flow model."""
    time = 1 - percent
    return shift * time / (1 + (shift - 1) * time)


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("start", [0.25, 0.3, 0.5])
def test_percentages_are_shares_of_the_steps(steps, start):
    dense = DensePart(start=start, end=0.1)
    sigmas = [shifted(step / steps) for step in range(steps)]
    reasons = [dense.step_reason(sigma, shifted) for sigma in sigmas]
    first = sum(reason.startswith("dense_start_percent") for reason in reasons)
    last = sum(reason.startswith("dense_end_percent") for reason in reasons)
    assert first == -(-round(start * steps, 9) // 1)
    assert last == int(0.1 * steps + 1e-9)
    assert reasons[first] == ""


@pytest.mark.parametrize(
    ("shares", "steps", "kept"),
    [
        ({"start": 0.3}, 4, [0]),
        ({"start": 0.2}, 4, [0]),
        ({"start": 0.2}, 2, []),
        ({"start": 0.5}, 4, [0, 1]),
        ({"start": 0.3, "end": 0.1}, 8, [0, 1, 2]),
        ({"start": 0.3, "end": 0.15}, 8, [0, 1, 7]),
        ({"start": 0.3, "end": 0.15}, 6, [0, 1]),
        ({"start": 0.3}, 50, list(range(15))),
    ],
)
def test_a_short_sampling_does_not_stay_dense_by_half_unless_half_is_asked_for(shares, steps, kept):
    dense = DensePart(**shares)
    levels = [shifted(step / steps) for step in range(steps + 1)]
    assert [i for i, level in enumerate(levels[:-1]) if dense.step_reason(level, shifted, levels)] == kept


def test_of_two_samplers_none_rounds_by_itself():
    """Each sees a part of the steps only, and half of that is not half of the whole."""
    levels = [shifted(step / 8) for step in range(9)]
    first, second = levels[:5], levels[4:]
    dense = DensePart(start=0.3)
    assert [bool(dense.step_reason(level, shifted, first)) for level in first[:-1]] == [True, True, True, False]
    assert not any(dense.step_reason(level, shifted, second) for level in second[:-1])


def test_the_last_digits_of_a_sigma_lose_no_step():
    sigma = shifted(0.3)
    for computed in (sigma * (1 + 1e-7), sigma, sigma * (1 - 1e-7)):
        assert DensePart(start=0.3).step_reason(computed, shifted) == ""
        assert DensePart(end=0.7).step_reason(computed, shifted) == "dense_end_percent"
    levels = [1.0, 0.88888890, 0.5, 0.0]
    assert step_of(0.88888889, levels) == (1, 3)


@pytest.mark.parametrize("steps", [6, 7, 9, 12, 20, 28, 30, 35])
def test_levels_out_of_a_table_count_as_the_shares_that_they_stand_for(steps):
    """ComfyUI's `simple` takes every so many of a thousand, a little above what the share of a step would be."""
    levels = [shifted(step * 1000 // steps / 1000) for step in range(steps + 1)]
    for kept in range(1, (steps - 1) // 2):
        for dense, wanted in (
            (DensePart(start=kept / steps), range(kept)),
            (DensePart(end=kept / steps), range(steps - kept, steps)),
        ):
            assert [i for i in range(steps) if dense.step_reason(levels[i], shifted)] == [*wanted]
            assert [i for i in range(steps) if dense.step_reason(levels[i], shifted, levels)] == [*wanted]
    assert DensePart(start=1e-3).step_reason(levels[0], shifted) == "dense_start_percent"


@pytest.mark.parametrize("even", [1.0, 0.3, 3.0])
@pytest.mark.parametrize(
    "schedule", [DenseSchedule(first_steps=5, last_steps=1), DenseSchedule(first_steps=0.2), DenseSchedule()]
)
def test_steps_of_a_preset_count_where_a_sampler_does_the_whole_sampling(schedule, even):
    """Whatever the scheduler: its steps may be fine at the start, or at the end."""
    levels = [shifted((step / 30) ** even) for step in range(31)]
    dense = DensePart(0.2, 1 / 30, steps=schedule)
    reasons = [dense.step_reason(level, shifted, levels) for level in levels[:-1]]
    assert [bool(reason) for reason in reasons] == [bool(schedule.step_reason(StepInfo(0, i, 30))) for i in range(30)]
    assert set(reasons) <= {"", "first_steps", "last_steps"}
    half = levels[:16]
    assert dense.step_reason(half[0], shifted, half) == "first_steps"  # by the share
    assert dense.step_reason(levels[-2], shifted, levels[15:]) == ("last_steps" if even <= 1 else "")


@pytest.mark.parametrize("steps", [3, 8, 10, 12, 20, 30, 50])
def test_a_sampling_that_leaves_its_first_step_out_is_whole(steps):
    """ComfyUI's ddim_uniform: every so many of a thousand, from the lowest."""
    table = range(1, 1000, 1000 // steps)
    levels = [*(shifted(1 - (level + 1) / 1000) for level in reversed(table)), 0.0]
    dense = DensePart(0.2, 0.1, steps=DenseSchedule(first_steps=1, last_steps=1))
    reasons = [dense.step_reason(level, shifted, levels) for level in levels[:-1]]
    assert reasons == ["first_steps", *[""] * (len(table) - 2), "last_steps"]


@pytest.mark.parametrize("steps", [4, 8, 20])
def test_a_sampling_behind_the_first_step_of_another_is_none(steps):
    levels = [shifted(step / steps) for step in range(1, steps + 1)]
    dense = DensePart(0.5 / steps, steps=DenseSchedule(first_steps=1))
    assert not any(dense.step_reason(level, shifted, levels) for level in levels[:-1])


def test_nothing_dense_is_nothing_dense():
    for sigma in (1.0, 80.0, 0.0):
        assert DensePart().step_reason(sigma, shifted) == ""


def test_two_samplers_share_one_scale():
    """Wan 2.2: the second sampler's table holds only its own steps."""
    levels = [shifted(step / 20) for step in range(10, 21)]
    assert [step_of(sigma, levels)[0] for sigma in levels[:-1]] == list(range(10))
    assert all(not DensePart(start=0.3).step_reason(sigma, shifted) for sigma in levels[:-1])


def test_steps_between_two_levels_belong_to_the_first():
    """Samplers of second order evaluate the model there; ones that add noise go above the first."""
    levels = [1.0, 0.6, 0.3, 0.0]
    assert [step_of(sigma, levels)[0] for sigma in (1.2, 1.0, 0.8, 0.6, 0.4, 0.3, 0.1)] == [0, 0, 0, 1, 1, 2, 2]
    assert step_of(0.5, [0.5]) == (0, 1)
    rising = [1e-4, 0.3, 0.6, 1.0]  # from a video to noise
    assert [step_of(sigma, rising)[0] for sigma in (0.0, 1e-4, 0.2, 0.3, 0.5, 0.6, 0.9)] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"start": -0.1}, "dense_start_percent is -0.1"),
        ({"end": 1.5}, "dense_end_percent is 1.5"),
        ({"start": float("nan")}, "dense_start_percent is nan"),
        ({"start": 0.6, "end": 0.4}, "leave no step sparse"),
        ({"start": 1.0}, "take the model from before this node"),
    ],
)
def test_bad_shares_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        DensePart(**shares)


def test_layers_from_a_list():
    assert parse_layers("") == parse_layers(" , ") == frozenset()
    assert parse_layers("0, 1,36 - 38", 39) == {0, 1, 36, 37, 38}


@pytest.mark.parametrize("text", ["one", "-1", "3-1", "1.5", "0;1"])
def test_other_lists_of_layers_are_refused(text):
    with pytest.raises(ValueError, match=r"dense_layers has .* write layer numbers"):
        parse_layers(text)


def test_a_layer_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match=r"dense_layers has '30', but the model has 30 layers: 0 to 29"):
        parse_layers("0,30", 30)


def test_all_layers_are_refused():
    for text in ("0-29", "0-14, 15-29"):
        with pytest.raises(ValueError, match=f"dense_layers is {text}: those are all 30 layers .* nothing would be sp"):
            parse_layers(text, 30)
    assert len(parse_layers("1-29", 30)) == 29 and len(parse_layers("0-29")) == 30


def test_branches_keep_their_names_in_any_company():
    known = {}
    both = {"cond_or_uncond": [1, 0], "uuids": ["n", "p"]}
    assert branches_of(both, known) == ["uncond", "cond"]
    assert branches_of({"cond_or_uncond": [0], "uuids": ["p"]}, known) == ["cond"]
    assert branches_of({"cond_or_uncond": [0, 0], "uuids": ["q", "p"]}, known) == ["cond #2", "cond"]
    assert branches_of({"cond_or_uncond": [2], "uuids": ["m"]}, known) == ["cond 2"]
    assert len(set(known.values())) == len(known) == 4


def test_the_two_sides_of_one_condition_are_two_branches():
    """ComfyUI adds a condition with an area to the other side, with its id."""
    known = {}
    assert branches_of({"cond_or_uncond": [0, 1], "uuids": ["p", "p"]}, known) == ["cond", "uncond"]
    assert branches_of({"cond_or_uncond": [1, 0, 1], "uuids": ["n", "p", "p"]}, known) == [
        "uncond #2",
        "cond",
        "uncond",
    ]


def test_branches_without_ids_are_told_by_their_kind():
    known = {}
    assert branches_of({}, known) == ["cond"]
    assert branches_of({"cond_or_uncond": [0, 1, 0]}, known) == ["cond", "uncond", "cond #2"]
    assert branches_of({"cond_or_uncond": [1]}, known) == ["uncond"]


@pytest.mark.parametrize(
    ("frames", "anchor", "words"),
    [
        ([0, 1, 2], None, "frames 0 to 2"),
        ([2, 3, 4], 0, "frames 2 to 4 behind 0"),
        ([0, 3, 6], -1, "frames 0 to 6 by 3"),
        ([8, 9, 0, 1], None, "frames 8 to 9 and 0 to 1"),
        ([7], None, "frames 7 to 7"),
    ],
)
def test_each_context_window_has_its_own_state(frames, anchor, words):
    """Two of the same first frame too, of which one may have every third frame."""
    window = SimpleNamespace(index_list=frames, causal_anchor_index=anchor)
    assert branches_of({"cond_or_uncond": [0], "uuids": ["p"], "context_window": window}, {}) == [f"cond, {words}"]


def test_a_pass_with_replaced_blocks_has_its_own_state():
    options = {"cond_or_uncond": [0], "uuids": ["p"], "patches_replace": {"dit": {("double_block", 1): print}}}
    assert branches_of(options, {}) == ["cond, 1 block replaced"]
    assert branches_of({}, {}, "stg_self_attn_blocks 29") == ["cond, stg_self_attn_blocks 29"]
