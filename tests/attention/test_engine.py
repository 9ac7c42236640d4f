from __future__ import annotations

import copy
import logging
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from plans import untrained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidaccel import SVG, SVG2, DenseSchedule, SparseAttention, Tangent, VideoLayout, sparse_attention
from vidaccel.attention import METHODS, PlanMemory, RandomBlocks, StepInfo, own_kernels
from vidaccel.attention.account import pending
from vidaccel.attention.account.timing import Span, event_class
from vidaccel.attention.backends import ELSEWHERE

LAYOUT = VideoLayout(5, 8, 8)
NEVER = DenseSchedule()


def tokens(layout: VideoLayout = LAYOUT, batch: int = 1):
    return tuple(torch.randn(batch, 2, layout.tokens, 16) for _ in range(3))


def make(method="svg2", **options) -> SparseAttention:
    method = untrained(method) if isinstance(method, str) else method
    return SparseAttention(method, num_layers=2, **{"schedule": NEVER, **options})


@pytest.mark.parametrize("name", METHODS)
def test_a_call_is_sparse_attention_from_the_methods_plan(name):
    q, k, v = tokens()
    engine = make(name)
    engine.enter(StepInfo(num_steps=4), LAYOUT)
    plan = untrained(name).plan(q, k, v, LAYOUT, PlanMemory())
    torch.testing.assert_close(engine(q, k, v, 0), sparse_attention(q, k, v, plan))
    (record,) = engine.report().records
    assert record.density == pytest.approx(plan.density()) and record.reason == ""
    assert record.plan_seconds > 0 and record.attention_seconds > 0


@pytest.mark.parametrize("name", METHODS)
def test_autocast_changes_nothing_of_what_is_planned(name):
    q, k, v = (x.bfloat16() for x in tokens())
    outs = []
    for enabled in (False, True):
        engine = make(name)
        engine.enter(StepInfo(num_steps=4), LAYOUT)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outs.append(engine(q, k, v, 0))
    torch.testing.assert_close(outs[1], outs[0], rtol=0.02, atol=0.02)


def test_layouts_that_come_in_turn_are_checked_once():
    """Two prompts with texts of unlike length, each in a pass of its own."""

    class Counting(SVG2):
        def check(self, layout):
            checked.append(layout)

    checked = []
    engine = make(Counting())
    layouts = [VideoLayout(5, 8, 8, text_after=text) for text in range(1, 7)]
    for step in range(3):
        for layout in layouts[:2]:
            engine.enter(StepInfo(step=step, num_steps=3), layout)
    assert checked == layouts[:2]
    for layout in layouts:
        engine.enter(StepInfo(run=1), layout)
    assert len(engine._fitting) == 4, "of a server's many prompts no more is kept"


def test_dense_calls_are_dense_and_recorded_with_the_reason():
    q, k, v = tokens()
    engine = make(schedule=DenseSchedule(first_steps=1, first_layers=1))
    for step in range(2):
        engine.enter(StepInfo(step=step, num_steps=2), LAYOUT)
        outs = [engine(q, k, v, layer) for layer in range(2)]
    assert outs[0].equal(F.scaled_dot_product_attention(q, k, v))
    assert [r.reason for r in engine.report().records] == ["first steps", "first steps", "first layers", ""]
    assert engine.report().dense_reasons() == {"first steps": 2, "first layers": 1}


def test_the_methods_own_schedule_holds_unless_another_is_given():
    method = SVG2(schedule=DenseSchedule(first_steps=3))
    assert SparseAttention(method, num_layers=1).schedule.first_steps == 3
    assert SparseAttention(method, num_layers=1, schedule=NEVER).schedule == NEVER


def test_state_is_kept_per_layer_branch_and_layout_and_emptied_by_a_new_run():
    engine = make("svg2")
    other = VideoLayout(3, 8, 8)
    for run, step, branch, layout in [(0, 0, "cond", LAYOUT), (0, 0, "uncond", LAYOUT), (0, 1, "cond", LAYOUT)]:
        engine.enter(StepInfo(run, step, 2, None, branch), layout)
        for layer in range(2):
            engine(*tokens(layout), layer)
    assert len(engine.memory.calls) == 4
    engine.enter(StepInfo(0, 1, 2, None, "cond"), other)
    engine(*tokens(other), 0)
    assert len(engine.memory.calls) == 5
    engine.enter(StepInfo(1, 0, 2, None, "cond"), LAYOUT)
    assert not engine.memory.calls


def test_a_batch_of_two_branches_equals_two_calls():
    """CFG in one batch or in two calls: the same result."""
    q, k, v = tokens(batch=2)
    both = make("svg2")
    both.enter(StepInfo(num_steps=1), LAYOUT)
    one = both(q, k, v, 0)
    apart = make("svg2")
    for i, branch in enumerate(("cond", "uncond")):
        apart.enter(StepInfo(num_steps=1, branch=branch), LAYOUT)
        torch.testing.assert_close(apart(q[i : i + 1], k[i : i + 1], v[i : i + 1], 0), one[i : i + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_infinity_are_refused_with_place_and_count(bad, which):
    inputs = tokens()
    inputs[which][0, 0, 3, 2] = bad
    engine = make("svg")
    engine.enter(StepInfo(step=7, num_steps=9), LAYOUT)
    with pytest.raises(ValueError, match=rf"1 of 10240 values of {'qk'[which]} .*layer 1 at step 7"):
        engine(*inputs, 1)


def test_a_call_that_does_not_fit_the_layout_stays_dense_and_says_so_once(caplog):
    engine = make("svg2")
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    q, k, v = tokens(VideoLayout(1, 5, 5))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert engine(q, k, v, 0).equal(F.scaled_dot_product_attention(q, k, v))
    assert len([r for r in caplog.records if "25 tokens does not fit" in r.getMessage()]) == 1
    assert any("25 tokens" in note for note in engine.report().notes)


def test_auto_says_once_what_it_chose():
    engine = make("svg2")
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    for layer in range(2):
        engine(*tokens(), layer)
    assert engine.report().notes == ("backend auto: masked for scattered plans on cpu",)


def test_a_named_backend_that_cannot_run_raises():
    engine = make("svg2", backend="sdpa")
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    with pytest.raises(RuntimeError, match="dense attention only"):
        engine(*tokens(), 0)


def test_a_layout_the_method_cannot_do_is_refused_before_the_run_works():
    engine = make(SVG(density=0.01), schedule=DenseSchedule(first_steps=0.75))
    with pytest.raises(ValueError, match="density 0.01 is below"):
        engine.enter(StepInfo(num_steps=4), LAYOUT)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [("sparge3", ValueError, "unknown method 'sparge3'.*radial, svg, svg2"), (3, TypeError, "config such as")],
)
def test_unknown_methods_list_the_known(method, error, message):
    with pytest.raises(error, match=message):
        make(method)


def test_the_report_sums_up_and_prints():
    engine = make(RandomBlocks(density=0.25), schedule=DenseSchedule(first_steps=1))
    for run in range(2):
        for step in range(3):
            engine.enter(StepInfo(run, step, 3), LAYOUT)
            for layer in range(2):
                engine(*tokens(), layer)
    report = engine.report()
    assert report.runs() == [0, 1] and len(report.last().records) == 6
    assert report.density_by_step() == pytest.approx({0: 1.0, 1: 0.25, 2: 0.25})
    assert report.density_map().shape == (2, 3) and report.density_map()[1].tolist() == pytest.approx([1, 0.25, 0.25])
    assert report.mean_density() == pytest.approx(0.5)
    text = str(report)
    assert "random" in text and "first steps (2)" in text and "masked" in text and "mean density 0.500" in text
    engine.reset()
    assert "no attention call" in str(engine.report())


def test_records_of_old_runs_are_dropped():
    engine = make(RandomBlocks())
    for run in range(12):
        engine.enter(StepInfo(run, 0, 1), LAYOUT)
        engine(*tokens(), 0)
        assert any("dropped" in note for note in engine.report().notes) == (run > 7)
    assert engine.report().runs() == list(range(4, 12))
    assert "note: records before run 4 were dropped: those of the last 8 runs are kept" in str(engine.report())
    engine.reset()
    assert not engine.report().notes


def test_notes_are_of_calls_and_go_with_their_records(caplog):
    engine, wrong = make(), [tokens(VideoLayout(1, 1, n)) for n in range(3, 15)]
    with caplog.at_level(logging.INFO):
        for run, others in enumerate(wrong):
            engine.enter(StepInfo(run, 0, 1), LAYOUT)
            engine(*tokens(), 0)
            engine(*others, 0)
        assert len(caplog.messages) == 2  # the numbers alone are others
    fits = [note for note in engine.report().notes if "does not fit" in note]
    assert len(fits) == 8 and "14 tokens" in fits[-1]
    engine.enter(StepInfo(12, 0, 1), LAYOUT)
    engine(*tokens(), 0)
    report = engine.report()
    assert report.last().notes == ("backend auto: masked for scattered plans on cpu", report.notes[-1])
    assert len(report.notes) == 9 and "noted" not in report.to_dict()


def test_what_stays_true_of_the_schedule_and_the_layout_stays_noted():
    engine = make(Tangent(probe=False), schedule=DenseSchedule(0.3))
    for run in range(12):
        engine.enter(StepInfo(run, 0, 4), LAYOUT)
        engine(*tokens(), 0)
    notes = engine.report().last().notes
    assert "fractions keep 1 of them" in notes[0] and "tangent: ranked" in notes[1]


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """How many tensors were read, each time."""
    counts, values = [], pending._values

    def counted(tensors):
        counts.append(len(tensors))
        return values(tensors)

    monkeypatch.setattr(pending, "_values", counted)
    return counts


def test_records_are_read_for_a_report_alone_and_once(read):
    engine = make(SVG(density=0.5), schedule=DenseSchedule(first_steps=1), measure_error=4)
    for run in range(10):
        for step in range(2):
            engine.enter(StepInfo(run, step, 2), LAYOUT)
            engine(*tokens(), 0)
    assert not read
    first = engine.report()
    assert [r.run for r in first.records] == [run for run in range(2, 10) for _ in range(2)]
    assert {(type(r.density), type(r.error), len(r.details["temporal"])) for r in first.measured()} == {
        (float, float, 2)
    }
    engine(*tokens(), 1)
    assert engine.report().records[:-1] == first.records
    assert engine.report().records == copy.deepcopy(engine).report().records
    assert read[:3] == [8 * 3, 3, 0]  # pairs, error and kinds of heads


def test_calls_of_very_many_runs_are_read_before_they_fill_the_gpu(read, monkeypatch):
    monkeypatch.setattr(pending, "KEPT_PENDING", 5)
    engine = make(RandomBlocks())
    for run in range(13):
        engine.enter(StepInfo(run, 0, 1, call=0), LAYOUT)
        engine(*tokens(), 0)
    assert read == [6, 6] and len(engine.report().records) == 13


def test_values_of_a_device_come_in_one_copy(monkeypatch):
    made = [torch.tensor(3), torch.rand(2, 3), torch.zeros(0), torch.tensor([True]), torch.tensor(7), torch.rand(4)]
    wanted, copies = [x.tolist() for x in made], []

    class Elsewhere(torch.Tensor):
        device = property(lambda x: torch.device("meta"))

        def cpu(self):
            copies.append(self.dtype)
            return self.as_subclass(torch.Tensor)

    assert pending._values([x.as_subclass(Elsewhere) for x in made]) == wanted
    assert copies == [torch.int64, torch.float32, torch.bool]


def test_the_fixed_control_keeps_its_plan_for_a_run():
    engine, memories = make(RandomBlocks(redraw=False)), []
    for run, step in ((0, 0), (0, 1), (1, 0)):
        engine.enter(StepInfo(run, step, 2), LAYOUT)
        engine(*tokens(batch=2), 0)
        memories.append(next(iter(engine.memory.calls.values())).drawn["random"])
    assert memories[0] is memories[1] is not memories[2]
    assert memories[0].to_dense_mask().equal(memories[2].to_dense_mask())  # the same seed


def test_reports_are_json(tmp_path):
    import json

    for method in (SVG(density=0.5), SVG2()):
        engine = make(method)
        engine.enter(StepInfo(num_steps=1), LAYOUT)
        engine(*tokens(), 0)
        assert json.loads(json.dumps(engine.report().to_dict()))["records"][0]["details"]


def test_memory_of_layouts_and_records_of_runs_are_bounded():
    """A server that makes videos of every size: the ones used last are kept."""
    engine = make(SVG(density=0.9))
    layouts = [VideoLayout(frames, 4, 4) for frames in range(2, 42)]
    for run, layout in enumerate([*layouts, layouts[-4]]):
        engine.enter(StepInfo(run, 0, 1), layout)
        engine(*tokens(layout), 0)
    kept = [layout for layout, _ in engine.memory.layouts]
    assert kept == [*layouts[-3:], layouts[-4]] and all(engine.memory.layouts.values())
    assert len(engine.report().runs()) == 8 and len(engine.report().records) == 8


def test_what_is_kept_of_calls_goes_with_its_layout_within_a_run():
    """A run of many sizes, as texts of ever other lengths make them."""
    engine = make("svg2")
    layouts = [VideoLayout(2, 4, 4, text_after=text) for text in range(8)]
    for step, layout in enumerate([*layouts, layouts[-4]]):
        engine.enter(StepInfo(0, step, 9), layout)
        for layer in range(2):
            engine(*tokens(layout), layer)
    assert [call[-2] for call in engine.memory.calls] == [layout for layout in layouts[-4:] for _ in range(2)]
    assert all(kept.call for kept in engine.memory.calls.values())


def test_a_schedule_that_leaves_nothing_sparse_is_said_once(caplog):
    engine = make(schedule=DenseSchedule(first_steps=3, last_steps=1))
    with caplog.at_level(logging.WARNING):
        for step in range(4):
            engine.enter(StepInfo(step=step, num_steps=4), LAYOUT)
    assert len([r for r in caplog.records if "all 4 steps stay dense" in r.getMessage()]) == 1
    assert "nothing will be sparse" in engine.report().notes[0]


@pytest.mark.parametrize("bound", [{"sigma_below": 1.0}, {"sigma_above": 0}])
def test_what_a_method_cannot_do_is_no_matter_where_every_noise_level_is_dense(bound):
    engine = make(SVG(density=0.01), schedule=DenseSchedule(**bound))
    for step, sigma in enumerate((1.0, 0.6)):
        engine.enter(StepInfo(step=step, num_steps=2, sigma=sigma), LAYOUT)
        engine(*tokens(), 0)
    assert all(record.reason.startswith("sigma") for record in engine.report().records)


def test_a_device_without_a_backend_stays_dense_and_says_so_once(caplog):
    engine = make()
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    with caplog.at_level(logging.WARNING):
        for layer in range(2):
            assert engine(*(x.to("meta") for x in tokens()), layer).device.type == "meta"
    assert len([r for r in caplog.records if "no backend runs on meta" in r.getMessage()]) == 1
    assert engine.report().dense_reasons() == {"no backend on meta": 2}
    named = make(backend="gather")
    named.enter(StepInfo(num_steps=1), LAYOUT)
    with pytest.raises((RuntimeError, NotImplementedError)):
        named(*(x.to("meta") for x in tokens()), 0)


def test_a_named_backend_is_asked_for_what_may_become_sparse_alone():
    engine = make(backend="gather", schedule=DenseSchedule(first_layers=1))
    elsewhere = [x.to("meta") for x in tokens()]
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    assert engine(*elsewhere, 0, dense="dense()").device.type == "meta"
    with pytest.raises(RuntimeError, match="'gather' cannot run this call"):  # before the first sparse layer
        engine(*elsewhere, 0)
    engine.enter(StepInfo(num_steps=1))
    assert engine(*elsewhere, 1).device.type == "meta"
    assert engine.report().dense_reasons() == {"dense()": 1, "unknown layout": 1}


@pytest.mark.parametrize("method", [untrained("radial"), SVG2(density=0.7), RandomBlocks(density=0.4)], ids=str)
def test_queries_that_are_none_of_the_models_do_not_count(method):
    """Cosmos 3: keys begin with tokens that have no query, and a plan's queries are its keys."""
    layout = VideoLayout(5, 4, 6, text_before=50)
    q, k, v = tokens(layout)
    q[:, :, :50] = 0
    engine = make(method, measure_error=30)
    engine.enter(StepInfo(num_steps=1), layout)
    out = engine(q, k, v, 0, first=50)
    plan = method.plan(q, k, v, layout, PlanMemory())
    (record,) = engine.report().records
    mask = plan.to_dense_mask()[:, :, 50:]
    assert record.density == pytest.approx(float(mask.double().mean()))
    assert plan.pairs(50).expand(1, mask.shape[1]).equal(mask.sum((-1, -2)))
    rows = engine._measured_rows(q, 0, 50)
    assert rows.min() >= 50 and rows.max() < layout.tokens and len(rows) == 30
    dense = F.scaled_dot_product_attention(q, k, v)[:, :, rows]
    assert record.error == pytest.approx(float((out[:, :, rows] - dense).norm() / dense.norm()), rel=1e-4)


def changed(**changes):
    """q, k, v of which some are replaced by `function(tensor)`."""
    return [changes.get(name, lambda x: x)(x) for name, x in zip("qkv", tokens(), strict=True)]


NONSENSE = {
    "no batch": (dict.fromkeys("qkv", lambda x: x[:0]), "must not be empty"),
    "no heads": (dict.fromkeys("qkv", lambda x: x[:, :0]), "must not be empty"),
    "no tokens": (dict.fromkeys("kv", lambda x: x[:, :, :0]), "must not be empty"),
    "no channels": (dict.fromkeys("qkv", lambda x: x[..., :0]), "must not be empty"),
    "three dimensions": (dict.fromkeys("qkv", lambda x: x[0]), r"must be \[B, H, N, D\]"),
    "heads": (dict.fromkeys("kv", lambda x: x.repeat(1, 2, 1, 1)), "q has 2 heads, and k and v have 4"),
    "heads of v": ({"v": lambda x: x[:, :1]}, "k and v in heads and length"),
    "values": ({"v": lambda x: x[:, :, 1:]}, "k and v in heads and length"),
    "dtype of k": ({"k": torch.Tensor.half}, "must have one dtype"),
    "dtype of v": ({"v": torch.Tensor.half}, "must have one dtype"),
    "whole numbers": (dict.fromkeys("qkv", torch.Tensor.long), "floating-point dtype, got torch.int64"),
    "device": ({"k": lambda x: x.to("meta")}, "must lie on one device"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_gets_one_clear_error_from_sparse_and_dense_calls_alike(name):
    changes, message = NONSENSE[name]
    given = changed(**changes)
    plan = RandomBlocks().plan(*tokens(), LAYOUT, PlanMemory())
    with pytest.raises(ValueError, match=message):
        sparse_attention(*given, plan)
    for method in METHODS:
        for schedule in (NEVER, DenseSchedule(first_steps=1)):
            engine = make(method, schedule=schedule)
            engine.enter(StepInfo(num_steps=4), LAYOUT)
            with pytest.raises(ValueError, match=message):
                engine(*given, 0)
            assert not engine.report().records


@pytest.mark.parametrize("method", METHODS)
def test_keys_of_another_length_than_the_layouts_are_refused(method):
    engine = make(method)
    engine.enter(StepInfo(num_steps=4), LAYOUT)
    with pytest.raises(ValueError, match="q and k of one length"):
        engine(*changed(**dict.fromkeys("kv", lambda x: x[:, :, 20:])), 0)


class Event:
    """Stands for `torch.mps.Event`, which needs the device: a clock that is read when it is recorded."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = 2000.0 if hasattr(Event, "last") else 500.0
        Event.last = self.at

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


def test_spans_use_the_events_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.mps, "Event", Event)
    # From torch 2.15 on, and for no device.
    monkeypatch.setattr(torch.mps, "current_stream", lambda: pytest.fail("its events take no stream"), raising=False)
    with Span(torch.device("mps")) as span:
        pass
    assert span.seconds() == 1.5
    assert event_class(torch.device("cpu")) is event_class(torch.device("meta")) is None
    assert event_class(torch.device("cuda")) is torch.cuda.Event and event_class(torch.device("xpu")) is torch.xpu.Event


def test_spans_are_of_the_stream_of_their_device(monkeypatch):
    """Not of the current device's, on which nothing may run."""
    recorded = []

    class OfStream(Event):
        def record(self, stream):
            recorded.append(stream)
            super().record()

    monkeypatch.setattr(torch.cuda, "Event", OfStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    with Span(torch.device("cuda:1")):
        pass
    assert recorded == ["stream of cuda:1"] * 2


def test_numbers_are_drawn_on_the_cpu_whatever_the_default_device():
    engine = make("random")
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    inputs = changed()
    with torch.device("meta"):  # a generator of the CPU draws for no other device
        out = engine(*inputs, 0)
    assert out.device.type == "cpu"


class NoFloat64(TorchDispatchMode):
    """Refuses what Apple's GPUs have not got, however it is asked for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
            raise TypeError(f"{function} made a float64 tensor")
        return result


@pytest.mark.parametrize("backend", ELSEWHERE)
@pytest.mark.parametrize("method", [*METHODS, SVG2(density=0.4, compensate=True)], ids=str)
def test_no_float64_is_needed_on_devices_beside_cpu_and_cuda(method, backend):
    engine = make(method, backend=backend, measure_error=8)
    q, k, v = tokens()
    with NoFloat64():
        with pytest.raises(TypeError, match="float64"):
            q.double()
        for step in range(2):
            engine.enter(StepInfo(step=step, num_steps=2), LAYOUT)
            engine(q, k, v, 0)
        assert 0 < engine.report().mean_density() <= 1


MEMORY = """
import resource, torch
from vidaccel import SVG, SVG2, Radial, DenseSchedule, SparseAttention, VideoLayout
from vidaccel.attention import PlanMemory, StepInfo
from vidaccel.attention.block_mask import to_block_mask
layout = VideoLayout(20, 32, 32)
q, k, v = (torch.randn(1, 2, layout.tokens, 8) for _ in range(3))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for method in (Radial(), SVG(density=0.1, sink=False), SVG2(density=0.05, init_iterations=2)):
    engine = SparseAttention(method, num_layers=1, schedule=DenseSchedule(), backend="gather")
    engine.enter(StepInfo(num_steps=1), layout)
    engine(q, k, v, 0)
    to_block_mask(method.plan(q, k, v, layout, PlanMemory()), 128)
print((peak() - before) / 1024)
"""


def test_no_quadratic_memory():
    """Plans, calls and block masks at 20,480 tokens: an N x N tensor of bools for two heads would be 800 MiB."""
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 300  # MiB


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "ranked by mean keys, without the probe of"),
        ({"probe": True}, "planning probes"),
        ({"probe": False}, "without the probe of"),
    ],
)
def test_the_report_says_what_tangent_plans_with(settings, words):
    engine = make(Tangent(density=0.5, **settings))
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    engine(*tokens(), 0)
    notes = [note for note in engine.report().notes if note.startswith("tangent:")]
    assert len(notes) == 1 and words in notes[0] and "%" in notes[0]
    assert ("fewer than 768 tokens" in notes[0]) == (settings == {})


@pytest.mark.parametrize(
    ("capability", "dtype", "channels", "runs"),
    [
        ((9, 0), torch.bfloat16, 128, True),
        ((8, 0), torch.float32, 256, True),
        ((7, 5), torch.float16, 64, False),
        ((9, 0), torch.float64, 64, False),
        ((9, 0), torch.float16, 320, False),
    ],
)
def test_kernels_plan_where_they_can_run(monkeypatch, capability, dtype, channels, runs):
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(own_kernels, "_FOUND", True)
    assert own_kernels.use_kernels(torch.zeros(1, 1, 4, channels, dtype=dtype)) == runs


def test_a_frozen_pass_keeps_no_plan_where_torch_records_gradients():
    engine = make("tangent")
    for frozen, inputs in ((True, tokens()), (False, tokens()), (True, [x.requires_grad_() for x in tokens()])):
        engine.enter(StepInfo(num_steps=2), LAYOUT, frozen=frozen)
        engine(*inputs, 0)
        assert bool(engine._passes._plans) == (not frozen or inputs[0].requires_grad)


@pytest.mark.parametrize("name", ["svg", "lvsa", "radial", "vsa", "svg2", "sparge"])
def test_one_memory_for_two_layouts_of_one_length(name):
    method, memory = untrained(name), PlanMemory()
    for layout in (VideoLayout(4, 4, 8), VideoLayout(4, 8, 4)):
        torch.manual_seed(0)
        q, k, v = tokens(layout)
        kept = replace(memory, call={}, counts={})
        wanted = method.plan(q, k, v, layout, PlanMemory()).to_dense_mask()
        assert method.plan(q, k, v, layout, kept).to_dense_mask().equal(wanted)


def test_what_a_method_expects_of_a_batch_is_as_what_is_measured():
    """Of two samples of one norm: the root of the mean square, not the mean."""
    engine = make(Tangent(tolerance=0.1), measure_error=LAYOUT.tokens)
    q, k, v = tokens(batch=2)
    q[0] *= 3
    engine.enter(StepInfo(num_steps=1), LAYOUT)
    engine(q, k, v, 0)
    (record,) = engine.report().records
    each = torch.tensor(record.details["predicted_error"])
    assert record.predicted_error == pytest.approx(each.square().mean().sqrt().item())
    assert each.mean() < record.predicted_error < each.max()
