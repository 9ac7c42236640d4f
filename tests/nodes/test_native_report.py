"""What the report of sparse attention in a native model shows, and of which samplings, without ComfyUI."""

from __future__ import annotations

from dataclasses import replace

import pytest
from native_calls import BATCHED, RECORDED, WAN, Executor, Recorded, model_of, run, session_of, step

from vidaccel import SVG2, Tangent
from vidaccel.nodes.native.override import NativeAttention
from vidaccel.nodes.native.sampling import DensePart
from vidaccel.nodes.report.news import CACHED, NEVER
from vidaccel.nodes.report.tables import report_text


def sampled(session: NativeAttention, *queued: str | None, recorded: Recorded = RECORDED["wan"], **options) -> None:
    for entry in queued:
        session.begin(entry)
        step(session, Executor(recorded), **options)
        session.end()


def told(session: NativeAttention, queued: str | None = None) -> tuple[list[int], str]:
    news = session.news(queued)
    return news.report.runs(), news.heading


def test_a_report_shows_its_own_sampling():
    session = session_of()
    sampled(session, "interrupted", "this", "this")  # two samplers share a model
    assert told(session, "this") == ([1, 2], "")
    assert told(session, "this") == ([1, 2], "")  # a second report node
    sampled(session, "next")
    assert told(session, "next") == ([3], "")
    sampled(session, "next")  # a second sampler behind the first report node
    assert told(session, "next") == ([4], "")


def test_without_a_queue_a_report_shows_what_none_has_shown():
    session = session_of()
    sampled(session, None, None)
    assert told(session) == ([0, 1], "")
    assert told(session) == ([1], CACHED)
    sampled(session, None)
    assert told(session) == ([2], "")


def test_a_result_from_the_cache_is_told():
    session = session_of()
    sampled(session, "first", "second")
    assert told(session, "second") == ([1], "")
    assert told(session, "later") == ([1], CACHED)
    text = report_text(session.news("later"))
    assert text.startswith("The result came from ComfyUI's cache: nothing was sampled this time.")


def test_a_model_that_was_never_sampled():
    assert told(session_of(), "first") == ([], NEVER)
    assert report_text(session_of().news()).startswith("The model was not sampled")


def test_a_dense_sampling_says_why_and_shows_no_earlier_one():
    session = session_of(dense=DensePart(start=0.9))
    sampled(session, "sparse", sigma=0.05)
    text = report_text(session.news("sparse"))
    assert "2 of 2" in text and "backend auto: " in text
    sampled(session, "unknown", recorded=replace(RECORDED["wan"], model=model_of("UnknownModel", **WAN)))
    text = report_text(session.news("unknown"))
    assert (
        "No call was sparse: the notes say why." in text and "UnknownModel is no model" in text and "step" not in text
    )
    sampled(session, "dense", sigma=0.5)
    text = report_text(session.news("dense"))
    assert "No call was sparse: dense_start_percent (2 calls)." in text and "2 of 2" not in text
    assert "UnknownModel" not in text and "backend auto" not in text


def test_notes_are_shown_with_the_run_that_they_are_true_of(caplog):
    session = session_of()
    for family in ("UnknownModel", "WanModel", "UnknownModel"):
        session.begin()
        step(session, Executor(replace(RECORDED["wan"], model=model_of(family, **WAN))))
        unknown = [note for note in session.news().report.notes if "is no model that sparse attention knows" in note]
        assert len(unknown) == (family == "UnknownModel")
    assert caplog.text.count("is no model that sparse attention knows") == 1


def test_notes_on_a_video_of_another_size_are_not_shown():
    """Tangent says how much of a short video its probe would read, which is another share at each size."""
    session = session_of(Tangent(density=0.5))
    sizes = [RECORDED[name] for name in ("wan", "wan odd size", "wan")]
    shown = []
    for entry, recorded in enumerate(sizes):
        sampled(session, str(entry), recorded=recorded)
        shown.append([note for note in session.news(str(entry)).report.notes if "without the probe" in note])
    assert shown[0] == shown[2] and shown[0] != shown[1] and [len(notes) for notes in shown] == [1, 1, 1]


def test_notes_of_a_backend_that_this_sampling_did_not_need_are_not_shown():
    """What `masked` is chosen for depends on the queries: on those of the first seed, for plans of both kinds."""
    session, fresh = (session_of(SVG2(density=0.5)) for _ in range(2))
    shown = []
    for log, queued, seed in ((session, "first", 0), (session, "second", 2), (fresh, "only", 2)):
        log.begin(queued)
        step(log, Executor(RECORDED["wan"], seeds=(seed,)))
        log.end()
        shown.append(log.news(queued).report.notes)
    assert shown[1] == shown[2] != shown[0] and set(shown[1]) < set(shown[0])


def test_records_do_not_pile_up():
    session = session_of(dense=DensePart(start=0.5))
    for _ in range(11):
        run(session, RECORDED["wan"], BATCHED)
    assert session.report().runs() == list(range(3, 11))
    assert len(session._dense_calls) == 8 * 2 * 2


def test_errors_are_measured_for_each_branch_and_change_nothing():
    recorded = RECORDED["wan"]
    outs = []
    for rows in (0, 16):
        session = session_of(measure_error=rows)
        session.begin()
        executor = step(session, Executor(recorded, seeds=(0, 1)), cond_or_uncond=[0, 1])
        outs.append(executor.outputs)
        sparse = [r for r in session.report().records if not r.reason]
        assert {r.branch for r in sparse} == {"cond", "uncond"}
        assert all((r.error is None) == (rows == 0) for r in sparse)
    assert all(one.equal(other) for one, other in zip(*outs, strict=True))
    assert "Measured error of the output in 4 sparse calls" in report_text(session.news())
    with pytest.raises(ValueError, match="measure_error is -1"):
        session_of(measure_error=-1)


def test_the_report_says_that_records_of_samplings_were_dropped():
    """Ten samplings of one model in one entry of the queue, as a loop makes them; the next entry has lost none."""
    said = "records of earlier samplings were dropped: those of the last 8 are kept"
    session, executor = session_of(), Executor(RECORDED["wan"])
    for number in range(10):
        session.begin("loop")
        step(session, executor)
        assert (said in session.report().notes) == (number > 7)
    assert f"Note: {said}" in report_text(session.news("loop"))
    session.begin("next")
    step(session, executor)
    assert said in session.report().notes and said not in session.news("next").report.notes
