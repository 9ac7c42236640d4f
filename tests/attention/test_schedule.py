from __future__ import annotations

import numpy as np
import pytest

from vidaccel import DenseSchedule, Tangent
from vidaccel.attention import StepInfo


def dense_steps(schedule: DenseSchedule, steps: int) -> list[int]:
    return [s for s in range(steps) if schedule.dense_reason(StepInfo(step=s, num_steps=steps), 5, 10)]


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (DenseSchedule(), 10, []),
        (DenseSchedule(first_steps=2, last_steps=1), 10, [0, 1, 9]),
        (DenseSchedule(first_steps=0.3), 10, [0, 1, 2]),
        (DenseSchedule(first_steps=0.25), 10, [0, 1, 2]),
        (DenseSchedule(first_steps=0.1, last_steps=0.1), 20, [0, 1, 18, 19]),
        (DenseSchedule(first_steps=1.0), 3, [0, 1, 2]),
    ],
)
def test_steps_by_count_and_by_fraction(schedule, steps, expected):
    assert dense_steps(schedule, steps) == expected


def test_layers_by_count_and_by_fraction():
    schedule = DenseSchedule(first_layers=1, last_layers=0.2)
    dense = [layer for layer in range(10) if schedule.dense_reason(StepInfo(), layer, 10)]
    assert dense == [0, 8, 9]


def test_sigma_bounds_and_the_reason_given():
    schedule = DenseSchedule(sigma_above=0.9, sigma_below=0.1)
    reasons = [schedule.dense_reason(StepInfo(sigma=s), 0, 1) for s in (0.95, 0.5, 0.05)]
    assert reasons == ["sigma above 0.9", "", "sigma below 0.1"]


@pytest.mark.parametrize("schedule", [DenseSchedule(sigma_above=0), DenseSchedule(sigma_below=1.0)])
def test_a_bound_that_takes_in_every_noise_level_takes_in_its_end(schedule):
    """The first step of a flow has a noise level of exactly 1."""
    for sigma in (1.0, 0.5, 0.0):
        assert schedule.dense_reason(StepInfo(step=0, num_steps=4, sigma=sigma), 0, 1), sigma
    assert "every noise level" in schedule.nothing_sparse(4, 1)


@pytest.mark.parametrize("schedule", [DenseSchedule(sigma_above=0.9), DenseSchedule(sigma_below=0.1, first_steps=1)])
def test_sigma_bounds_are_refused_where_no_noise_level_is_known(schedule):
    with pytest.raises(ValueError, match=r"DenseSchedule.sigma_\w+ needs the noise level.*Use first_steps"):
        schedule.dense_reason(StepInfo(step=0, num_steps=4), 0, 1)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (DenseSchedule(first_steps=3, last_steps=1), "all 4 steps stay dense"),
        (DenseSchedule(first_steps=1.0), "all 4 steps stay dense"),
        (DenseSchedule(first_layers=0.5, last_layers=5), "all 10 layers stay dense"),
        (DenseSchedule(sigma_above=0.0), "every noise level stays dense"),
        (DenseSchedule(sigma_below=1), "every noise level stays dense"),
        (DenseSchedule(sigma_above=0.3, sigma_below=0.5), "every noise level stays dense"),
        (DenseSchedule(sigma_above=1.0), "nothing will be dense"),
        (DenseSchedule(), ""),
        (DenseSchedule(first_steps=0.25, sigma_above=1.0), ""),
        (DenseSchedule(first_steps=1, last_layers=2, sigma_above=0.9, sigma_below=0.1), ""),
    ],
)
def test_a_schedule_in_which_nothing_is_ever_sparse_or_dense_says_so(schedule, message):
    warning = schedule.warning(4, 10)
    assert message in warning and bool(warning) == bool(message)


def test_a_warning_names_what_is_set_and_no_more():
    assert DenseSchedule(first_steps=4, sigma_below=0.0).warning(4, 10).startswith("first_steps 4, sigma_below 0.0: ")


def test_all_steps_of_a_short_run_are_not_those_of_the_others():
    assert DenseSchedule(first_steps=1).warning(1, 10).endswith("so nothing will be sparse in runs of 1 steps")
    assert DenseSchedule(first_layers=10).warning(1, 10).endswith("so nothing will be sparse")


def test_unknown_number_of_steps_is_an_error_only_where_it_is_needed():
    assert DenseSchedule(first_steps=3).dense_reason(StepInfo(step=1), 0, 1) == "first steps"
    for schedule in (DenseSchedule(first_steps=0.3), DenseSchedule(last_steps=1)):
        with pytest.raises(
            ValueError, match="is unknown here, where the scheduler .* or use a whole number of first_steps"
        ):
            schedule.dense_reason(StepInfo(step=1), 0, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"first_steps": -1}, "first_steps is -1"),
        ({"first_steps": 1.5}, "write 2 for a count"),
        ({"last_layers": "all"}, "last_layers is 'all'"),
        ({"sigma_above": 2.0}, "sigma_above is 2.0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DenseSchedule(**values)


@pytest.mark.parametrize(
    ("schedule", "steps", "kept"),
    [
        (DenseSchedule(first_steps=0.3), 4, (1, 0)),
        (DenseSchedule(first_steps=0.2), 4, (1, 0)),
        (DenseSchedule(first_steps=0.2), 2, (0, 0)),
        (DenseSchedule(first_steps=0.2), 1, (0, 0)),
        (DenseSchedule(first_steps=0.1, last_steps=0.1), 4, (1, 0)),
        (DenseSchedule(first_steps=1, last_steps=0.1), 4, (1, 0)),
        (DenseSchedule(first_steps=0.2, last_steps=0.2), 5, (1, 1)),
        (DenseSchedule(first_steps=0.5), 4, (2, 0)),
        (DenseSchedule(first_steps=0.3), 5, (2, 0)),
        (DenseSchedule(first_steps=2), 4, (2, 0)),
        (DenseSchedule(first_steps=2, last_steps=2), 4, (2, 2)),
    ],
)
def test_fractions_keep_less_than_half_of_a_short_run_unless_half_is_asked_for(schedule, steps, kept):
    assert schedule.steps_of(steps) == kept
    dense = [s for s in range(steps) if s < kept[0] or s >= steps - kept[1]]
    assert dense_steps(schedule, steps) == dense
    assert [s for s in range(steps) if schedule.step_reason(StepInfo(step=s, num_steps=steps))] == dense


def test_what_rounding_down_left_of_a_schedule_is_told():
    assert "4 steps, and the schedule's fractions keep 1 of them dense instead of 2" in DenseSchedule(0.3).remark(4)
    assert "keep none of them dense instead of 1" in DenseSchedule(0.2).remark(2)
    assert DenseSchedule(0.3).remark(50) == DenseSchedule(2).remark(4) == DenseSchedule(0.3).remark(None) == ""


def test_numbers_of_other_libraries_are_told_apart():
    for made in (lambda: DenseSchedule(first_steps=np.int64(2)), lambda: Tangent(density=np.float32(0.5))):
        with pytest.raises(ValueError, match=r"It is a (int64|float32): give a number of Python, as its item\(\) is"):
            made()
    with pytest.raises(ValueError, match="must be above 0 and at most 1; [^:]*$"):
        Tangent(density=2.0)
