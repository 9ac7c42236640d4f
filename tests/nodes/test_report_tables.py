"""What the report node shows."""

from __future__ import annotations

import numpy as np
import torch

from vidaccel.attention import CallRecord, DenseSchedule, RunReport
from vidaccel.nodes.report.news import GenerationReport, News
from vidaccel.nodes.report.tables import report_image, report_text, side_by_side


def record(run: int = 0, step: int = 0, layer: int = 0, **changes) -> CallRecord:
    values = {
        "num_steps": 2,
        "branch": "cond",
        "model": "Wan",
        "method": "SVG2",
        "density": 0.25,
        "reason": "",
        "backend": "triton",
        "plan_seconds": 0.5,
        "attention_seconds": 1.5,
        "details": {},
    }
    return CallRecord(run=run, step=step, layer=layer, **(values | changes))


DENSE = {"density": 1.0, "reason": "dense_start_percent", "backend": "ComfyUI", "plan_seconds": 0.0}


def report(*records: CallRecord, notes: tuple[str, ...] = ()) -> RunReport:
    return RunReport("SVG2", {"density": 0.25, "dense_layers": "", "q_clusters": None}, records, notes)


def text_of(shown: RunReport) -> str:
    return report_text(News(shown))


def test_steps_are_counted_from_1_wherever_they_are_told():
    own = {"predicted_error": 0.1, "error_is_measured": True}
    text = text_of(report(record(step=0), record(step=1, details=own)))
    assert "    2/2    0.250" in text and "worst 10 % in layer 0 at step 2 (cond)." in text


def test_a_schedule_is_told_field_by_field():
    schedule = DenseSchedule(first_steps=0.2, sigma_above=0.9)
    for given, words in (
        (schedule, "first_steps 0.2, sigma_above 0.9, density 0.5"),
        (DenseSchedule(), "first_steps 0,"),
    ):
        shown = RunReport("svg2", {"schedule": given, "density": 0.5, "q_clusters": None}, (record(),))
        assert text_of(shown).startswith(f"svg2: {words}")


def test_the_table_says_what_each_step_did():
    calls = [record(layer=layer, **DENSE) for layer in range(2)] + [record(step=1, layer=layer) for layer in range(2)]
    lines = text_of(report(*calls, notes=("backend auto: triton",))).splitlines()
    assert lines[0] == "SVG2: density 0.25"
    assert lines[2] == "Wan, 2 layers"
    assert " ".join(lines[4].split()) == "1/2 1.000 0 of 2 0 ms 3.0 s ComfyUI; dense_start_percent (2)"
    assert " ".join(lines[5].split()) == "2/2 0.250 2 of 2 1.0 s 3.0 s triton"
    assert lines[6] == "Mean density 0.625; planning 1.0 s, attention 6.0 s."
    assert lines[7] == "Note: backend auto: triton"


def test_two_samplings_of_one_model_have_a_table_each():
    text = text_of(report(record(run=3), record(run=4), record(run=4, step=1)))
    assert text.count("Mean density") == 2 and text.count("2/2") == 1


def test_no_call_is_said_and_why():
    text = text_of(report(notes=("ThatModel is no model that sparse attention knows",)))
    assert "No call was sparse: the notes say why." in text and "Note: ThatModel" in text
    assert "no attention call over a video was seen. Another node may" in text_of(report())
    dense = [record(layer=layer, **DENSE) for layer in range(2)]
    assert "No call was sparse: dense_start_percent (2 calls)." in text_of(report(*dense))


def test_a_video_from_the_cache_is_told():
    made = GenerationReport(News(report(record())), "first")
    assert report_text(made.news("first")) == report_text(made.news()) == text_of(report(record()))
    assert report_text(made.news("second")).startswith("The video came from ComfyUI's cache: below is the run")


def test_the_picture_is_an_image_of_comfyui():
    values = [record(step=step, layer=layer, density=0.2 + 0.1 * layer) for step in range(4) for layer in range(3)]
    image = report_image(report(*values))
    assert image.dtype == torch.float32 and image.shape[0] == 1 and image.shape[3] == 3 and image.shape[1] > 200
    assert image.min() >= 0 and image.max() == 1
    assert image[0, 0, 0].tolist() == [1, 1, 1]
    other = report_image(report(*values[:6], record(step=3, layer=2, density=1.0)))
    assert not image.equal(other)
    assert torch.equal(image, report_image(report(*values)))


def test_runs_stand_side_by_side_even_of_unequal_depth():
    one = report_image(report(record(run=0), record(run=1, layer=1)))
    alone = report_image(report(record(run=1, layer=1)))
    assert one.shape[1:] == alone.shape[1:] and not np.array_equal(one, alone)


def test_an_empty_report_is_an_empty_picture():
    assert report_image(report()).shape[3] == 3


class TestMeasuredErrors:
    CALLS = tuple(
        record(
            step=step,
            layer=layer,
            error=0.02 * (1 + step + layer),
            error_seconds=0.25,
            details={"predicted_error": [0.01]} if layer else {},
        )
        for step in range(2)
        for layer in range(2)
    )

    def test_they_have_a_table_and_a_headline(self):
        lines = text_of(report(record(**DENSE, layer=2), *self.CALLS)).splitlines()
        table = [" ".join(line.split()) for line in lines]
        assert table[-4:] == [
            "step median error worst error predicted worst in",
            "1/2 3.0 % 4.0 % 1.0 % layer 1, cond",
            "2/2 5.0 % 6.0 % 1.0 % layer 1, cond",
            "Measured error of the output in 4 sparse calls: median 4.0 %, worst 6.0 % in layer 1 at step 2/2; "
            "measuring 1.0 s.",
        ]
        head, *rows = lines[-4:-1]
        assert all(row.index("layer") == head.index("worst in") for row in rows)

    def test_a_layer_is_that_of_a_model_where_there_are_two(self):
        text = text_of(report(record(error=0.5), record(error=0.6, model="transformer_2")))
        assert "layer 0 of transformer_2, cond" in text and "in layer 0 of transformer_2 at step 1/2" in text

    def test_a_method_that_predicts_nothing_has_no_column_for_it(self):
        text = text_of(report(record(error=0.5)))
        assert "median error" in text and "predicted" not in text

    def test_what_a_method_measured_itself_is_told(self):
        text = text_of(report(record(details={"predicted_error": [0.04], "error_is_measured": True})))
        assert "Error of the output in 1 sparse calls, on the queries that the method measured: median 4.0 %" in text

    def test_nothing_is_said_where_nothing_was_measured(self):
        assert "rror" not in text_of(report(record()))

    def test_maps_stand_below_the_density(self):
        plain, measured = report_image(report(record())), report_image(report(*self.CALLS))
        assert measured.shape[1] == 3 * plain.shape[1] and measured.shape[2] == plain.shape[2]
        unpredicted = report_image(report(record(error=0.5)))
        assert unpredicted.shape[1] == 2 * plain.shape[1]


def test_two_runs_of_one_model_do_not_share_a_column():
    shown = side_by_side(report(record(run=3), record(run=4, density=0.75), record(run=4, step=1)))
    assert shown.density_map().tolist() == [[0.25, 0.75, 0.25]]
