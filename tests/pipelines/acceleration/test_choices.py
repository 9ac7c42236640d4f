"""What is chosen where nothing is asked for, and what is refused before a run, not at its first sparse step."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, replace

import pytest
import torch
from huggingface_hub import constants
from tiny_families import build
from tiny_families.base import mask
from tiny_wan import generate, make_transformer

import vidaccel
from vidaccel import SLA, SVG, SVG2, DenseSchedule, Tangent
from vidaccel.attention import METHODS, SparseAttention, StepInfo, VideoLayout, backends
from vidaccel.generation.tuning.store import store
from vidaccel.pipelines.acceleration.families import FAMILIES, find_transformers
from vidaccel.pipelines.acceleration.rebinding import SparseProcessor
from vidaccel.pipelines.break_even import BreakEven, Key

SCHEDULE = DenseSchedule(first_steps=1)


def test_without_a_method_long_videos_are_sparse_and_short_ones_stock(pipe, caplog):
    before = generate(pipe)
    with caplog.at_level("INFO", "vidaccel"), vidaccel.accelerate(pipe) as handle:
        assert generate(pipe).equal(before)
        report = handle.report()
        assert isinstance(handle.method, Tangent)
    assert {r.reason for r in report.records} == {"min_tokens 8192, above the video's 80 tokens"}
    assert report.notes[0] == "no method was given: tangent" and caplog.text.count(report.notes[0]) == 1
    (why,) = (note for note in report.notes if note.startswith("min_tokens"))
    command = "`vidaccel break-even --heads 2 --head-dim 32 --device cpu --dtype float32 --threads 1`"
    assert why == f"min_tokens 8192: 8,192 tokens are a fixed default: {command} measures it on this machine."
    with vidaccel.accelerate(pipe, min_tokens=80) as handle:
        assert not generate(pipe, frames=33, size=96).equal(before)
        handle.reset()
        assert handle.report().notes[0] == "no method was given: tangent, from 80 tokens up"


def test_without_a_method_what_was_measured_on_this_machine_counts(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    heads = FAMILIES[0].heads(pipe.transformer.config)
    key = Key.here(*heads, torch.device("cpu"), torch.float32)
    with vidaccel.accelerate(pipe) as handle:
        store(key, BreakEven(220, 200))  # between the two; after `accelerate`, but before a run
        generate(pipe)  # 80 tokens
        generate(pipe, frames=33, size=96)
        report = handle.report()
        assert {r.run for r in report.records if not r.reason} == {1}
        assert {r.reason for r in report.records if not r.run} == {"min_tokens 220, above the video's 80 tokens"}
        told = "sparse attention was measured to pay from 220 tokens."
        assert [note for note in report.notes if told in note] == [f"min_tokens 220: On this machine, {told}"]
    for given in ({"method": "svg2"}, {"min_tokens": 0}):  # what is given goes before it
        with vidaccel.accelerate(pipe, schedule=SCHEDULE, **given) as handle:
            generate(pipe)
            assert any(not r.reason for r in handle.report().records)


@pytest.mark.parametrize("name", ["wan", "cosmos_3", "kandinsky5", "kandinsky6"])
def test_a_break_even_is_of_the_heads_that_attention_is_called_with(name, monkeypatch):
    tiny, seen = build(name), set()
    (transformer, family), *_ = find_transformers(tiny.model).values()
    call = SparseAttention.__call__

    def look(engine, q, *rest, **more):
        seen.add((q.shape[1], q.shape[3]))
        return call(engine, q, *rest, **more)

    monkeypatch.setattr(SparseAttention, "__call__", look)
    with vidaccel.accelerate(tiny.model, schedule=SCHEDULE):
        tiny.run()
    assert seen == {family.heads(transformer.config)}


def test_min_tokens_is_for_a_method_that_is_given_too(pipe):
    with vidaccel.accelerate(pipe, SVG2(density=0.4), schedule=SCHEDULE, min_tokens=81) as handle:
        generate(pipe)  # 80 tokens
        generate(pipe, frames=33)
        sparse = {r.run: not r.reason for r in handle.report().records if r.step}
    assert sparse == {0: False, 1: True}


def test_a_short_video_whose_text_is_padded_is_stock_up_to_the_padding():
    tiny = build("hunyuan_video")
    expected = tiny.run()
    with vidaccel.accelerate(tiny.model, SVG2(), schedule=SCHEDULE, min_tokens=10**6) as handle:
        torch.testing.assert_close(tiny.run(), expected, atol=1e-5, rtol=1e-5)
        assert {r.reason.partition(" ")[0] for r in handle.report().records} == {"min_tokens"}


def test_what_stays_dense_need_not_be_possible(pipe):
    """16 tokens: there are too many stand-ins for the density."""
    before = generate(pipe, frames=1)
    with vidaccel.accelerate(pipe, "tangent") as handle:
        with handle.dense():
            assert generate(pipe, frames=1).equal(before)
        with pytest.raises(ValueError, match="Tangent density is 0.2"):
            generate(pipe, frames=1)


def test_a_default_method_that_cannot_do_a_video_leaves_it_dense_and_says_why(caplog):
    """Helios reads its history exactly, which is more of the pairs than the default computes."""
    tiny = build("helios")
    before = tiny.run()
    schedule = DenseSchedule()
    with (
        caplog.at_level("WARNING", "vidaccel"),
        vidaccel.accelerate(tiny.model, schedule=schedule, min_tokens=0) as handle,
    ):
        assert tiny.run().equal(before) and tiny.run().equal(before)
        report = handle.report()
    assert {r.reason for r in report.records} == {"tangent cannot do this video"}
    (why,) = (note for note in report.notes if "stay dense" in note)
    said = "Tangent density is 0.2, but the history, which stays dense, makes 0.684 of the pairs"
    assert said in why and caplog.text.count(why) == 1
    (enough,) = re.findall(r'accelerate\(pipe, "tangent", density=([\d.]+)\) computes 0.2 of all other pairs', why)
    with vidaccel.accelerate(tiny.model, Tangent(density=float(enough), schedule=schedule)) as handle:
        assert not tiny.run().equal(before)
        assert {r.reason for r in handle.report().records} == {""}
    with (
        vidaccel.accelerate(tiny.model, Tangent(schedule=schedule)),
        pytest.raises(ValueError, match="but the history"),
    ):
        tiny.run()


def test_why_a_video_is_dense_is_said_once_for_prompts_of_many_lengths():
    tiny = build("hunyuan_video")
    with vidaccel.accelerate(tiny.model, schedule=DenseSchedule(), min_tokens=0) as handle:
        for length in (3, 5, 6):
            tiny.run(encoder_attention_mask=mask(length, padded=8))
        report = handle.report()
    assert set(report.dense_reasons()) == {"tangent cannot do this video"}
    assert len([note for note in report.notes if "stay dense" in note]) == 1


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("helios", "history"),
        ("hunyuan_framepack", "history with picture and text"),
        ("ltx_condition", "conditioning"),
        ("minimax_h3_keyframes", "text with pictures and sound"),
        ("hunyuan_video", "text"),
    ],
)
@pytest.mark.parametrize("method", [Tangent(density=0.01), SVG2(density=0.01), SVG(density=0.01)], ids=lambda m: m.name)
def test_a_density_that_is_too_low_names_what_stays_dense_beside_the_video(name, beside, method):
    tiny = build(name)
    said = rf"density .*0\.01.* the {beside}, which stays dense.*raise density"
    with vidaccel.accelerate(tiny.model, method, schedule=DenseSchedule()), pytest.raises(ValueError, match=said):
        tiny.run()


def test_a_pass_outside_a_run_is_dense_where_the_default_schedule_counts_in_fractions(pipe):
    """What a user tries by hand after a run, and what another pipeline with this transformer does."""
    latents, text = torch.randn(1, 4, 5, 8, 8), torch.randn(1, 6, 16)

    def by_hand():
        generate(pipe)
        with torch.no_grad():
            return pipe.transformer(latents, torch.tensor([123.0]), text, return_dict=False)[0]

    with torch.no_grad():
        before = pipe.transformer(latents, torch.tensor([123.0]), text, return_dict=False)[0]
    for given in ((), ("svg2",)):
        with vidaccel.accelerate(pipe, *given, min_tokens=0) as handle:
            assert by_hand().equal(before)
            report = handle.report()
            assert {r.reason for r in report.last().records} == {"number of steps unknown"}
            (note,) = (note for note in report.notes if "default schedule" in note)
            assert "give accelerate a DenseSchedule with a whole number of first_steps" in note
            handle.reset()
            generate(pipe)
            assert any(not r.reason for r in handle.report().records)
    for asked in ({"schedule": DenseSchedule(first_steps=0.2)}, {"method": SVG2(density=0.4)}):
        said = r"first_steps=0\.[23] is a fraction .* use a whole number"
        with vidaccel.accelerate(pipe, **{"method": "svg2", **asked}), pytest.raises(ValueError, match=said):
            by_hand()


def test_settings_of_a_method_that_is_named_may_stand_beside_it(pipe):
    written = Tangent(density=0.5, k_clusters=4, schedule=SCHEDULE)
    with vidaccel.accelerate(pipe, written) as handle:
        expected = generate(pipe)
    with vidaccel.accelerate(pipe, "tangent", density=0.5, k_clusters=4, schedule=SCHEDULE) as handle:
        assert generate(pipe).equal(expected)
        assert handle.method == replace(written, schedule=Tangent().schedule)
    with vidaccel.accelerate(pipe, "sla", linear_scope="none", topk=0.3) as handle:  # which needs no training
        assert handle.method == SLA(linear_scope="none", topk=0.3)


@pytest.mark.parametrize(
    ("method", "settings", "error", "words"),
    [
        (
            "tangent",
            {"densty": 0.2},
            TypeError,
            "tangent has no setting 'densty'; it has schedule, density, tolerance,",
        ),
        ("svg2", {"min_token": 5}, TypeError, "svg2 has no setting 'min_token'; it has .*top_p"),
        ("radial", {"density": 0.2}, TypeError, r"it has .*decay.*Radial.for_density\(VideoLayout\(...\), density\)"),
        ("sla", {"density": 0.2}, TypeError, "sla has no setting 'density'; it has .*topk"),
        (None, {"density": 0.2}, TypeError, r'accelerate\(pipe, "tangent", density=0.2\)'),
        (Tangent(), {"density": 0.3}, TypeError, r"density=0.3 is beside a config, .* give Tangent\(density=0.3\)"),
        ("tangent", {"density": 2}, ValueError, "Tangent density is 2"),
        ("tangnt", {"density": 0.2}, ValueError, "unknown method 'tangnt'"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_words(pipe, method, settings, error, words):
    with pytest.raises(error, match=words):
        vidaccel.accelerate(pipe, method, **settings)
    assert not any(isinstance(p, SparseProcessor) for p in pipe.transformer.attn_processors.values())


def test_no_setting_of_a_method_has_the_name_of_something_else():
    own = set(inspect.signature(vidaccel.accelerate).parameters) - {"schedule"}
    assert not {f"{name}.{f.name}" for name, cls in METHODS.items() for f in fields(cls) if f.name in own}


@pytest.mark.parametrize("everything", [{"first_steps": 1.0}, {"first_layers": 1.0}, {"sigma_above": 0.0}], ids=str)
def test_a_schedule_that_keeps_everything_dense_asks_nothing_of_the_method(pipe, everything):
    before = generate(pipe, frames=1)
    with vidaccel.accelerate(pipe, "tangent", schedule=DenseSchedule(**everything)) as handle:
        assert generate(pipe, frames=1).equal(before)
        assert any("so nothing will be sparse" in note for note in handle.report().notes)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"schedule": 0.3}, TypeError, r"schedule is 0\.3: give a DenseSchedule"),
        ({"method": SVG2(schedule=2)}, TypeError, "schedule is 2: give a DenseSchedule"),
        ({"min_tokens": -1}, ValueError, "min_tokens is -1: .* 0 or more"),
        ({"min_tokens": 0.5}, ValueError, r"min_tokens is 0\.5"),
        ({"backend": "triton"}, RuntimeError, "'triton' cannot be used here: it runs on cuda"),
        ({"backend": "sdpa"}, RuntimeError, "'sdpa' cannot be used here: it computes dense attention only"),
        ({"backend": "flex", "method": "tangent"}, RuntimeError, "'flex' cannot .* 'auto', 'gather'"),
    ],
)
def test_what_cannot_be_is_refused_at_once(pipe, monkeypatch, given, error, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends.BACKENDS["flex"], "unavailable", lambda device: None)
    with pytest.raises(error, match=words):
        vidaccel.accelerate(pipe, **{"method": "svg2", **given})
    assert not any(isinstance(p, SparseProcessor) for p in pipe.transformer.attn_processors.values())


def test_a_machine_without_a_fast_backend_is_refused_but_a_slow_one_by_name(pipe, monkeypatch):
    """A GPU without Triton: `gather` would launch a kernel for each tile."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(backends.WORTHWHILE, "cpu", ("triton",))
    with pytest.raises(RuntimeError, match="'auto' cannot be used here: it finds no backend .* cpu: triton"):
        vidaccel.accelerate(pipe, "svg2")
    with vidaccel.accelerate(pipe, "svg2", backend="gather"):
        generate(pipe)


@pytest.mark.parametrize(
    ("backend", "dtype", "words"),
    [("auto", torch.float32, "finds no backend that is fast"), ("gather", torch.float8_e4m3fn, "takes .*not float8")],
)
def test_the_first_call_tells_what_only_a_call_can_be_it_dense(monkeypatch, backend, dtype, words):
    """Weights that move to another device after `accelerate`, and dtypes."""
    if backend == "auto":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setitem(backends.WORTHWHILE, "cpu", ("triton",))
    engine = SparseAttention("svg2", num_layers=1, backend=backend, schedule=SCHEDULE)
    engine.enter(StepInfo(), VideoLayout(2, 4, 4))
    q = torch.ones(1, 1, 32, 8).to(dtype)
    with pytest.raises(RuntimeError, match=words):
        engine(q, q, q, 0)


def test_a_transformer_alone_without_a_method():
    transformer = make_transformer()
    with pytest.raises(ValueError, match="DenseSchedule\\(first_steps=...\\) with a whole number"):
        vidaccel.accelerate(transformer)
    with vidaccel.accelerate(transformer, schedule=SCHEDULE) as handle:
        assert handle.method.name == "tangent"
