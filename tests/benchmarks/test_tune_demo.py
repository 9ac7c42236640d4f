"""The table of what tune finds against fixed defaults, from measurements that are made up."""

from __future__ import annotations

import pytest
from benchmark_scripts import imported


@pytest.fixture(scope="module")
def tune_demo():
    with imported("tune_demo") as module:
        yield module


def rows(seconds: float, *psnrs: float | None, computed: int = 40) -> list[dict]:
    return [{"seconds": seconds + n, "psnr": psnr, "computed": computed} for n, psnr in enumerate(psnrs)]


def test_a_default_that_leaves_most_videos_as_they_are_is_not_carried_by_them(tune_demo):
    """Of 100, 100 and 40 dB the mean is 80, and the PSNR of the mean error 45."""
    found = {
        "rare": {"of": "rare", "psnr": 48.34, "tuned": {}, "tuned_label": "found"},
        "slow": {"of": "slow", "psnr": 30.0, "tuned": None, "tuned_label": "dense"},
    }
    measured = {
        "dense": rows(10.0, None, None, None),
        "rare": rows(9.0, 100.0, 100.0, 40.0, computed=39),
        "found": rows(5.0, 50.0, 50.0, 50.0, computed=20),
        "slow": rows(12.0, 30.0, 30.0, 30.0),
    }
    first, second = tune_demo.table(found, measured)
    assert (first["PSNR, default"], first["of the mean error, default"]) == ("80.0", "44.8")
    assert (first["PSNR, found"], first["of the mean error, found"]) == ("50.0", "50.0")
    assert first["faster on"] == "3 of 3" and first["passes, found"] == 20
    assert first["difference"].startswith("-30.00 ±")
    assert second["PSNR, found"] == second["of the mean error, found"] == "identical" and second["difference"] == "–"


def test_what_is_tuned_on_is_held_out_of_what_is_measured(tune_demo):
    tuned_on, others = tune_demo.prompts_of()
    assert len(tuned_on) == 8 and sorted([*tuned_on, *others]) == list(range(64))
