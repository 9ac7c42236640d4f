"""Which steps are forecast, by what, and how far off they are said to be."""

from __future__ import annotations

import pytest
import torch

from vidaccel.attention import StepInfo
from vidaccel.pipelines.forecast import forecasts as module
from vidaccel.pipelines.forecast.settings import ForecastSettings

ONE, BENT = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(0))
LINE, CURVE = 0.0, 2.0


def made_with(tolerance: float, **settings: int) -> module.Forecasts:
    return module.Forecasts(ForecastSettings(tolerance, **settings))


def noise(place: float, bend: float) -> torch.Tensor:
    return ONE + place * BENT + bend * place**2 * ONE


def asks(forecasts: module.Forecasts, step: StepInfo, place: float, keep: bool = False) -> bool:
    """Of latents on a straight way."""
    return forecasts.computes(step, place, place * BENT, keep)


def learn(forecasts: module.Forecasts, step: StepInfo, place: float, noise: list[torch.Tensor]) -> None:
    forecasts.add(step, place, noise, torch.float32)


def wild(number: int) -> torch.Tensor:
    """No line goes through these."""
    return torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(number))


def run(forecasts: module.Forecasts, bend: float, steps: int = 20, branches=("cond", "uncond"), known: bool = True):
    """The steps that are forecast, and how far off each was in truth, as a share of what a flow makes of it."""
    found, off = [], []
    for number in range(steps):
        place = 1 - number / steps
        for branch in branches:
            step = StepInfo(0, number, steps if known else None, None, branch)
            if asks(forecasts, step, place):
                learn(forecasts, step, place, [noise(place, bend)])
                continue
            (ahead,) = forecasts.ahead(step, place)
            if branch == branches[0]:
                found.append(number)
                off.append(((ahead - noise(place, bend)).norm() / noise(place, bend).norm() / (1 - place)).item())
    return found, off


def test_on_a_straight_line_all_but_the_first_and_last_are():
    found, off = run(made_with(1e-4, most=0), LINE)
    assert found == list(range(3, 19)) and max(off) < 1e-5
    assert run(made_with(1e-4, most=0, last_steps=0), LINE)[0] == list(range(3, 20))
    assert run(made_with(1e-4, most=0), LINE, known=False)[0] == list(range(3, 20))
    assert run(made_with(1e-4, first_steps=6, most=0, last_steps=3), LINE)[0] == list(range(6, 17))
    assert run(made_with(1e-4, first_steps=0, most=2), LINE)[0] == [n for n in range(3, 19) if n % 3 != 2]


@pytest.mark.parametrize("tolerance", [0.03, 0.1])
def test_on_a_curve_as_far_as_the_tolerance_goes(tolerance):
    """The error of a line on a parabola is known to the digit, but for the size of the noise, which changes."""
    forecasts = made_with(tolerance, most=0)
    found, off = run(forecasts, CURVE)
    assert found and forecasts.refused
    assert forecasts.errors == pytest.approx(off, rel=0.5)
    assert max(forecasts.errors) <= tolerance < min(forecasts.refused)
    assert len(run(made_with(tolerance / 4, most=0), CURVE)[0]) < len(found)


def test_branches_are_forecast_together():
    """By the one that bends most."""
    forecasts = made_with(0.1, most=0)
    for number in range(8):
        place = 1 - number / 20
        first, second = (StepInfo(0, number, 20, None, branch) for branch in ("cond", "uncond"))
        both = [asks(forecasts, step, place) for step in (first, second)]
        assert both[0] == both[1]
        if both[0]:
            learn(forecasts, first, place, [noise(place, LINE)])
            learn(forecasts, second, place, [wild(number)])
    assert not forecasts.errors and len(forecasts.refused) == 5


def test_a_step_that_is_kept_is_computed():
    forecasts = made_with(1.0, most=0)
    for number in range(6):
        step, place = StepInfo(0, number, 20), 1 - number / 20
        assert asks(forecasts, step, place, keep=number == 4) is (number != 3 and number != 5)
        if number not in (3, 5):
            learn(forecasts, step, place, [noise(place, LINE)])


def test_a_branch_that_is_not_known_yet_is_computed():
    forecasts = made_with(1.0)
    for number in range(5):
        step, place = StepInfo(0, number, 20), 1 - number / 20
        if asks(forecasts, step, place):
            learn(forecasts, step, place, [noise(place, LINE)])
    assert forecasts.errors and asks(forecasts, StepInfo(0, 4, 20, None, "perturbed"), 0.8)


def test_a_branch_that_is_there_in_some_steps_alone():
    """It holds up no others, and its old points are not gone by."""
    forecasts = made_with(1e-3, most=0)
    steps = {"cond": (0, 1, 2, 3, 4, 5), "skipped layers": (0, 1, 5)}
    asked = {}
    for number in range(6):
        for branch in [branch for branch, there in steps.items() if number in there]:
            step, place = StepInfo(0, number, 20, None, branch), 1 - number / 20
            asked[branch, number] = asks(forecasts, step, place)
            if asked[branch, number]:
                learn(forecasts, step, place, [noise(place, LINE)])
    assert [asked["cond", number] for number in range(6)] == [True] * 3 + [False] * 3
    assert asked["skipped layers", 5]


def test_steps_of_one_level_and_latents_of_another_size():
    """Second-order schedulers have a level twice; a video in stages changes its size within a run."""
    forecasts = made_with(1.0, most=0)
    for number, place in enumerate((1.0, 0.95, 0.95, 0.9)):
        step = StepInfo(0, number, 20)
        assert asks(forecasts, step, place)
        learn(forecasts, step, place, [noise(place, CURVE)])
    (ahead,) = forecasts.ahead(StepInfo(0, 4, 20), 0.85)
    torch.testing.assert_close(ahead, noise(0.9, CURVE) + (noise(0.9, CURVE) - noise(0.95, CURVE)))
    learn(forecasts, StepInfo(0, 4, 20), 0.85, [torch.ones(1, 8, 12)])
    assert asks(forecasts, StepInfo(0, 5, 20), 0.8)


@pytest.mark.parametrize("straight_first", [True, False])
def test_the_worst_of_all_samples_and_tensors_counts(straight_first):
    """Of two videos in a batch, of which one bends; and of a video and its sound."""
    in_a_batch, with_sound = made_with(0.1), made_with(0.1)
    for number in range(6):
        step, place = StepInfo(0, number, 20), 1 - number / 20
        both = [noise(place, LINE), wild(number)]
        both = both if straight_first else both[::-1]
        for forecasts, made in ((in_a_batch, [torch.cat(both)]), (with_sound, both)):
            assert asks(forecasts, step, place)
            learn(forecasts, step, place, made)
