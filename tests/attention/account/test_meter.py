"""The measured error is the error: against float64 on all rows, for every method, and without a trace in the output."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from plans import untrained

from vidaccel import SLA, SVG, SVG2, VSA, DenseSchedule, Radial, Sparge, SparseAttention, Tangent, VideoLayout
from vidaccel.attention import METHODS, RandomBlocks, StepInfo
from vidaccel.attention.account import meter
from vidaccel.attention.account.meter import relative_error, sample_rows

LAYOUT = VideoLayout(5, 8, 8)
WITH_TEXT = VideoLayout(4, 6, 7, text_before=3, text_after=9)
ALL = 10_000
# The text alone is a large part of so short a sequence, so the default density of one is out of reach.
EACH = [Tangent(density=0.4) if name == "tangent" else untrained(name) for name in METHODS]
CPU = torch.device("cpu")


def tokens(layout: VideoLayout, batch: int = 1, dtype: torch.dtype = torch.float32):
    return tuple(torch.randn(batch, 3, layout.tokens, 16).mul(1.5).to(dtype) for _ in range(3))


def engine_of(method, rows: int, **options) -> SparseAttention:
    return SparseAttention(
        method, num_layers=2, **{"schedule": DenseSchedule(), "backend": "reference", "measure_error": rows, **options}
    )


def call(method, inputs, layout: VideoLayout, rows: int, **options):
    """The output of a second step, and its record: by then methods have a memory."""
    engine = engine_of(method, rows, **options)
    for step in range(2):
        engine.enter(StepInfo(step=step, num_steps=2), layout)
        out = engine(*inputs, 1)
    return out, engine.report().records[-1]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [LAYOUT, WITH_TEXT], ids=["video", "text"])
@pytest.mark.parametrize("method", EACH, ids=lambda m: m.name)
def test_with_all_rows_it_is_the_whole_error(method, layout, batch):
    inputs = tokens(layout, batch)
    out, record = call(method, inputs, layout, ALL)
    dense = F.scaled_dot_product_attention(*(x.double() for x in inputs))
    expected = float((out - dense).norm() / dense.norm())
    assert record.error == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert record.error_seconds > 0 and record.reason == ""


@pytest.mark.parametrize("method", EACH, ids=lambda m: m.name)
def test_the_output_is_the_same_to_the_bit_and_no_random_state_is_touched(method):
    inputs = tokens(WITH_TEXT)
    state = torch.get_rng_state()
    without, record = call(method, inputs, WITH_TEXT, 0)
    assert torch.get_rng_state().equal(state) and record.error is None and record.error_seconds == 0
    measured, record = call(method, inputs, WITH_TEXT, 16)
    assert torch.get_rng_state().equal(state) and record.error > 0
    assert measured.equal(without)


@pytest.mark.parametrize(
    "method", [SVG(density=1.0), SVG2(top_p=1.0), Tangent(density=1.0), RandomBlocks(density=1.0)], ids=str
)
def test_nothing_is_wrong_at_density_one(method):
    _, record = call(method, tokens(LAYOUT), LAYOUT, ALL)
    assert record.density == 1 and record.error < 1e-5


@pytest.mark.parametrize("method", [SVG2(density=0.4), Radial(), Sparge(topk=0.3)], ids=lambda m: m.name)
def test_a_sample_tells_the_whole(method):
    layout = VideoLayout(9, 12, 12)
    inputs = tokens(layout)
    whole, some = (call(method, inputs, layout, rows)[1].error for rows in (ALL, 64))
    assert some == pytest.approx(whole, rel=0.25) and some != whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_half_precision_is_measured_in_float32(dtype):
    """The rounding of the output to bfloat16 is a part of its error; that of the meter would be as large again."""
    q, k, v = tokens(LAYOUT, dtype=dtype)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = relative_error(exact.to(torch.float64), q, k, v, sample_rows(LAYOUT.tokens, 32, 0, CPU))
    assert error < (1e-6 if dtype == torch.bfloat16 else 1e-14)


def test_autocast_does_not_reach_it():
    """The method's products are in bfloat16 then, which is an error of its output; the meter's are not."""
    inputs = tokens(LAYOUT)
    with torch.autocast("cpu", torch.bfloat16):
        out, record = call(SVG(density=1.0), inputs, LAYOUT, ALL, backend="gather")
    dense = F.scaled_dot_product_attention(*(x.double() for x in inputs))
    assert record.error == pytest.approx(float((out - dense).norm() / dense.norm()), rel=1e-3) and record.error > 1e-4


def test_heads_in_parts_are_the_same(monkeypatch):
    q, k, v = tokens(LAYOUT, batch=2)
    out, rows = torch.randn_like(q), sample_rows(LAYOUT.tokens, 20, 3, CPU)
    whole = relative_error(out, q, k, v, rows)
    monkeypatch.setattr(meter, "CHUNK_BYTES", 1)
    torch.testing.assert_close(relative_error(out, q, k, v, rows), whole)


def test_values_of_zero_have_no_error():
    q, k, v = tokens(LAYOUT)
    assert relative_error(v * 0, q, k, v * 0, torch.arange(4)) == 0


@pytest.mark.parametrize("total", [1, 7, 63, 64, 65, 100, 32_760])
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_rows_lie_one_in_each_part_and_are_others_in_another_turn(total, rows):
    picked = [sample_rows(total, rows, turn, CPU) for turn in range(40)]
    count = min(rows, total)
    for one in picked:
        assert one.dtype == torch.int64 and len(one) == count
        part = [i * total // count for i in range(count + 1)]
        assert all(low <= row < high for low, row, high in zip(part, one.tolist(), part[1:], strict=False))
    if total >= 100:
        assert len({tuple(one.tolist()) for one in picked}) > 25
        columns = torch.cat(picked) % 8
        assert len(columns.unique()) == 8  # no column of a frame is left out


def test_nothing_is_read_on_the_host():
    """On `meta` there are no values: a read would raise."""
    q, k, v = (x.to("meta") for x in tokens(LAYOUT, batch=2, dtype=torch.bfloat16))
    error = relative_error(v, q, k, v, sample_rows(LAYOUT.tokens, 16, 5, q.device))
    assert error.device.type == "meta" and error.shape == () and error.dtype == torch.float32


def test_dense_calls_are_not_measured():
    engine = engine_of("svg2", 16, schedule=DenseSchedule(first_layers=1))
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    for layer in range(2):
        engine(*tokens(LAYOUT), layer)
    assert [r.error is None for r in engine.report().records] == [True, False]


class TestMethodsThatAreTrained:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("layout", [LAYOUT, WITH_TEXT], ids=["video", "text"])
    def test_the_coarse_branch_of_vsa_is_no_error(self, layout, dtype):
        """Its dense calls have it, too."""
        inputs, gate = tokens(layout, batch=2, dtype=dtype), torch.randn(2, 3, layout.tokens, 16, dtype=dtype)
        errors = []
        for density in (0.4, 1.0):
            engine = engine_of(VSA(cube=(2, 2, 2), density=density), ALL)
            engine.enter(StepInfo(num_steps=1), layout)
            out, dense = engine(*inputs, 0, weights=gate), engine(*inputs, 0, dense="to compare", weights=gate)
            (record,) = engine.report().measured()
            errors.append(record.error)
            expected = float((out - dense).norm() / dense.norm())
            assert record.error == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert not engine.report().notes
        assert errors[0] > 0.1 and errors[1] < 1e-5

    def test_what_sla_learned_is_told_to_be_no_measure_of_quality(self):
        weights = torch.nn.Linear(16, 16).requires_grad_(False)
        for scope, told in (("all", True), ("none", False)):
            engine = engine_of(SLA(topk=0.4, block=(16, 16), linear_scope=scope), 16)
            engine.enter(StepInfo(num_steps=1), LAYOUT)
            for layer in range(2):
                engine(*tokens(LAYOUT), layer, weights=weights)
            notes = [note for note in engine.report().notes if "no measure of quality" in note]
            assert len(notes) == told and len(engine.report().measured()) == 2
        engine = engine_of(SLA(topk=0.4, block=(16, 16)), 0)
        engine.enter(StepInfo(num_steps=1), LAYOUT)
        engine(*tokens(LAYOUT), 0, weights=weights)
        assert not engine.report().notes


def test_gradients_flow_as_without():
    inputs = tokens(LAYOUT)
    grads = []
    for rows in (0, 16):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        engine = engine_of("svg2", rows)
        engine.enter(StepInfo(num_steps=1), LAYOUT)
        engine(q, k, v, 0).square().mean().backward()
        grads.append(q.grad)
    assert grads[0].equal(grads[1])


@pytest.mark.parametrize("rows", [-1, 1.5, True, "64", None])
def test_what_is_no_count_is_refused(rows):
    with pytest.raises(ValueError, match=r"measure_error is .*0 or more"):
        engine_of("svg2", rows)


class TestReport:
    @pytest.fixture
    def report(self):
        engine = engine_of(Tangent(density=0.3), 32, schedule=DenseSchedule(first_steps=1))
        for step in range(3):
            for branch in ("cond", "uncond"):
                engine.enter(StepInfo(step=step, num_steps=3, branch=branch), LAYOUT)
                for layer in range(2):
                    engine(*tokens(LAYOUT), layer)
        return engine.report()

    def test_maps_have_layers_and_steps(self, report):
        true, predicted = report.error_map(), report.predicted_error_map()
        assert true.shape == predicted.shape == (2, 3)
        assert torch.tensor(true[:, 0]).isnan().all() and (true[:, 1:] > 0).all() and (predicted[:, 1:] > 0).all()
        of_place = [r.error for r in report.records if (r.layer, r.step) == (1, 2)]
        assert len(of_place) == 2 and true[1, 2] == pytest.approx(sum(of_place) / 2)

    def test_the_worst_comes_first_and_is_told_with_its_place(self, report):
        calls = report.measured()
        assert len(calls) == 8 and calls[0].error == max(r.error for r in calls)
        text = str(report)
        assert f"in layer {calls[0].layer} at step {calls[0].step} ({calls[0].branch})" in text
        for words in ("in 8 sparse calls: median", "the method itself predicted", "measuring took"):
            assert words in text
        assert "measure_error=32" in text

    def test_it_is_json(self, report):
        records = json.loads(json.dumps(report.to_dict(), default=str))["records"]
        assert records[0]["error"] is None and records[-1]["error"] > 0

    @pytest.mark.parametrize("rows", [0, 32])
    def test_with_a_tolerance_the_method_has_measured_it_itself(self, rows):
        engine = engine_of(Tangent(tolerance=0.05), rows)
        for layer in range(2):
            engine.enter(StepInfo(num_steps=1), LAYOUT)
            engine(*tokens(LAYOUT), layer)
        report = engine.report()
        worst, other = report.measured_by_method()
        assert len(report.measured()) == bool(rows) * 2
        assert 0.05 >= worst.own_error >= other.own_error >= 0
        assert report.predicted_error_map()[worst.layer, 0] == worst.own_error
        for first in (0, 1):
            assert f"at step {first} (" in report.error_in_words(first)
        own = "error of the output in 2 sparse calls, on the queries that the method measured: median"
        assert (own in str(report)) == (rows == 0)
        assert ("the method itself measured a median of" in str(report)) == (rows > 0)
        assert ("measuring took" in str(report)) == (rows > 0)

    def test_without_the_meter_nothing_is_said(self):
        engine = engine_of("svg2", 0)
        engine.enter(StepInfo(num_steps=1), LAYOUT)
        engine(*tokens(LAYOUT), 0)
        report = engine.report()
        assert not report.measured() and not report.error_in_words()
        assert torch.tensor(report.error_map()).isnan().all()
        assert "error" not in str(report)
