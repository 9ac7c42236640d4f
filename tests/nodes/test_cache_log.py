"""What the report node shows of caches of a MODEL, without ComfyUI."""

from __future__ import annotations

import logging

import pytest

from vidaccel.nodes.report.cache_log import CacheLog, CachesReport
from vidaccel.nodes.report.news import CACHED
from vidaccel.nodes.report.wording import InputError, said_of_inputs
from vidaccel.pipelines.forecast.settings import ForecastSettings
from vidaccel.pipelines.guidance_cache.settings import GuidanceCache


@pytest.fixture
def log() -> CacheLog:
    return CacheLog("Cache", "nothing", logging.getLogger("vidaccel.test"))


def sampled(log: CacheLog, queued: str | None, *texts: str) -> None:
    log.begin(queued)
    for text in texts:
        log.tell(logging.INFO, text)


def notes(log: CacheLog | CachesReport, *queued: str | None) -> list[str]:
    return [note.removeprefix("Cache: ") for note in log.news(*queued).report.notes]


def test_a_report_behind_each_of_two_samplers_shows_its_own(log):
    sampled(log, "entry", "first")
    assert notes(log, "entry") == ["first"]
    sampled(log, "entry", "second")
    assert notes(log, "entry") == ["second"]
    assert notes(log, "entry") == ["first", "second"]  # another report node
    sampled(log, "next", "third")
    assert notes(CachesReport("", [log]), "next") == ["third"]


def test_one_report_behind_two_samplers_shows_both(log):
    for text in ("first", "second"):
        sampled(log, "entry", text)
    assert notes(log, "entry") == ["first", "second"]
    assert log.news("later").heading == CACHED and notes(log, "later") == ["first", "second"]
    sampled(log, "later")
    assert notes(log, "later") == ["nothing"] and not log.news("later").heading


def test_of_the_last_samplings_alone(log):
    for text in ("first", "second", "third"):
        sampled(log, "entry", text)
    assert [note[7:] for note in log.news("entry", 2).report.notes] == ["second", "third"]
    assert notes(log, "entry") == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("made", "renamed", "message"),
    [
        (lambda: ForecastSettings(most=-5), {"most": "max_consecutive"}, "^max_consecutive is -5: it counts steps"),
        (lambda: ForecastSettings(-1), {"most": "max_consecutive"}, "^tolerance is -1"),
        (lambda: GuidanceCache(first_steps=2.0), {"first_steps": "first_percent"}, r"^first_percent is 2\.0"),
    ],
)
def test_settings_are_refused_in_the_words_of_inputs(made, renamed, message):
    kind = "GuidanceCache" if "first_steps" in renamed else "ForecastSettings"
    with pytest.raises(InputError, match=message), said_of_inputs(kind, **renamed):
        made()
