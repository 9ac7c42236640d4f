"""What a forecast cache is set to."""

from __future__ import annotations

import numpy as np
import pytest

from vidaccel.pipelines.forecast.settings import FIRST, ForecastSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tolerance": 0.0}, r"^ForecastSettings\.tolerance is 0\.0: it must be a number above 0"),
        ({"tolerance": float("nan")}, r"tolerance is nan"),
        ({"tolerance": float("inf")}, r"tolerance is inf"),
        ({"tolerance": True}, r"tolerance is True"),
        ({"tolerance": "0.1"}, r"tolerance is '0\.1'"),
        ({"most": -5}, r"^ForecastSettings\.most is -5: it counts steps, as a whole number of 0 or more"),
        ({"first_steps": 0.2}, r"first_steps is 0\.2"),
        ({"last_steps": np.int64(2)}, r"last_steps is np\.int64\(2\).* give a number of Python"),
    ],
)
def test_values_out_of_their_bounds(values, message):
    with pytest.raises(ValueError, match=message):
        ForecastSettings(**values)


def test_runs_that_have_no_step_to_forecast():
    assert FIRST == 3
    assert [ForecastSettings().keeps_all(n) for n in (1, 4, 5)] == [True, True, False]
    assert [ForecastSettings(first_steps=0, last_steps=0).keeps_all(n) for n in (3, 4)] == [True, False]
    assert ForecastSettings(last_steps=100).keeps_all(12) and ForecastSettings(first_steps=100).keeps_all(100)
