"""The attention override against recorded calls of every native model, without ComfyUI.

`test_native_comfyui.py` runs the models themselves.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from native_calls import (
    HEAD_DIM,
    HEADS,
    RECORDED,
    WAN,
    Executor,
    Recorded,
    dense,
    expected,
    model_of,
    session_of,
    step,
    with_cross,
)

from vidaccel import SVG, SVG2, Radial, VideoLayout
from vidaccel.generation.tuning.store import store
from vidaccel.nodes.native.override import KEY, OVERRIDE
from vidaccel.nodes.native.sampling import DensePart
from vidaccel.pipelines.break_even import BreakEven, Key


@pytest.fixture(params=RECORDED)
def recorded(request) -> Recorded:
    return RECORDED[request.param]


@pytest.mark.parametrize(
    "method",
    [SVG2(density=0.6), SVG(density=0.6, sink=False), Radial(block_size=8, decay=0.05, near=0.3, min_window=0)],
)
def test_calls_over_the_video_are_sparse_attention_and_no_others(recorded, method):
    session = session_of(method)
    played = step(session, Executor(recorded, 2), cond_or_uncond=[0, 1])
    assert [place for place in range(len(recorded.calls)) if place not in played.asked] == list(recorded.video)
    for place, (inputs, out) in enumerate(zip(played.inputs, played.outputs, strict=True)):
        if place in recorded.video:
            torch.testing.assert_close(out, expected(method, *inputs, recorded.layout, flat=True))
            assert not torch.allclose(out, dense(*inputs, HEADS, skip_reshape=True), atol=1e-3)
        else:
            assert out.equal(dense(*inputs, HEADS, skip_reshape=True))
    records = session.report().records
    assert {r.layer for r in records} == set(recorded.video.values())
    assert {r.branch for r in records} == {"cond", "uncond"} and all(r.reason == "" for r in records)


def test_layers_are_numbered_as_they_run(recorded):
    session = session_of(dense=DensePart(layers=frozenset([0])))
    played = step(session, Executor(recorded))
    assert played.asked == [p for p in range(len(recorded.calls)) if recorded.video.get(p, 0) == 0]
    assert session.report().dense_reasons() == {"dense_layers": 1}


def test_density_one_is_dense(recorded):
    played = step(session_of(SVG2(density=1.0)), Executor(recorded))
    for inputs, out in zip(played.inputs, played.outputs, strict=True):
        torch.testing.assert_close(out, dense(*inputs, HEADS, skip_reshape=True))


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_the_output_can_keep_its_heads_apart(name):
    flat, apart = (step(session_of(), Executor(RECORDED[name], **kw)) for kw in ({}, {"skip_output_reshape": True}))
    for one, other in zip(flat.outputs, apart.outputs, strict=True):
        assert one.equal(other.transpose(1, 2).flatten(2))


def test_declined_calls_go_to_the_override_that_was_there(recorded):
    seen = []

    def former(func, q, k, v, heads, *args, **kwargs):
        seen.append(q.shape)
        return -func(q, k, v, heads, *args, **kwargs)

    played = step(session_of(), Executor(recorded), **{OVERRIDE: former})
    assert len(seen) == len(played.asked) == len(recorded.calls) - len(recorded.video)
    for place in played.asked:
        assert played.outputs[place].equal(-dense(*played.inputs[place], HEADS, skip_reshape=True))


def test_dense_steps_go_to_the_override_that_was_there():
    def former(func, *args, **kwargs):
        return torch.zeros_like(args[0])

    session = session_of(dense=DensePart(start=0.5))
    played = step(session, Executor(RECORDED["wan"]), sigma=0.75, **{OVERRIDE: former})
    assert not any(out.any() for out in played.outputs)
    assert session.report().dense_reasons() == {"dense_start_percent": 2}


def test_the_override_is_one_function_in_all_steps():
    """torch.compile guards on it: a new one in each step would compile each step anew."""
    found = []

    class Keep(Executor):
        def __call__(self, x, t, c_concat, c_crossattn, control, transformer_options, **conditions):
            found.append(transformer_options[OVERRIDE])
            return x

    session = session_of()
    for sigma in (1.0, 0.75):
        step(session, Keep(RECORDED["wan"]), sigma)
    step(session, Keep(RECORDED["wan"]), 0.5, **{OVERRIDE: dense})
    assert found[0] is found[1] is not found[2]


def test_the_options_of_the_caller_stay_as_they_are():
    options = {"sigmas": torch.tensor([0.5]), "block_index": 3, OVERRIDE: lambda func, *args, **kw: func(*args, **kw)}
    before = dict(options)
    wan = RECORDED["wan"]
    session_of().forward(Executor(wan), torch.zeros(1, 16, 5, 8, 8), torch.ones(1), None, None, None, options)
    assert options == before and KEY not in options


def test_an_unknown_model_stays_dense_and_says_so_once(caplog):
    unknown = Recorded(model_of("TomorrowsModel", **WAN), (5, 8, 8), VideoLayout(5, 4, 4), RECORDED["wan"].calls, {})
    session = session_of()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            played = step(session, Executor(unknown))
            for inputs, out in zip(played.inputs, played.outputs, strict=True):
                assert out.equal(dense(*inputs, HEADS, skip_reshape=True))
    assert len(caplog.records) == 1 and "TomorrowsModel is no model" in caplog.text and "Wan VACE" in caplog.text
    assert session.report().records == () and "TomorrowsModel" in session.report().notes[0]


def test_a_model_under_torch_compile_is_known_by_what_was_compiled():
    wan = RECORDED["wan"]
    compiled = Recorded(SimpleNamespace(_orig_mod=wan.model), wan.latent, wan.layout, wan.calls, wan.video)
    session = session_of()
    step(session, Executor(compiled))
    assert session.report().mean_density() == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("name", ["wan", "ltxv", "cosmos predict2"])
def test_text_as_long_as_the_video_stays_dense(name, caplog):
    """Then nothing tells a self-attention call from a cross-attention call."""
    known = RECORDED[name]
    recorded = Recorded(
        known.model, known.latent, known.layout, [(80, 80, *c[2:]) for c in known.calls], {}, known.heads_apart, text=80
    )
    session = session_of()
    played = step(session, Executor(recorded))
    assert len(played.asked) == len(recorded.calls)
    assert "as long as the video" in session.report().notes[0] and "as long as" in caplog.text


def test_calls_that_fit_no_layout_stay_dense_and_are_noted(caplog):
    """A later version of a model with tokens that the geometry does not know."""
    wan = RECORDED["wan"]
    changed = Recorded(wan.model, wan.latent, wan.layout, with_cross(81, [0, 1], "double"), {})
    session = session_of()
    played = step(session, Executor(changed))
    assert len(played.asked) == 4
    (note,) = session.report().notes
    assert "had the 80 tokens of 5 frames of 4x4," in note and "Another node may compute self-attention itself" in note
    assert note in caplog.text


def test_packed_latents_and_images_stay_dense():
    session, wan = session_of(), RECORDED["wan"]
    for shape in ((1, 16, 64), (1, 16, 8, 8)):
        session.forward(Executor(wan), torch.zeros(shape), torch.ones(1), None, None, None, {})
    assert [note.split(" is no video")[0] for note in session.report().notes] == [
        "a latent of 1x16x64",
        "a latent of 1x16x8x8",
    ]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"mask": torch.ones(80, 80, dtype=torch.bool).tril()}, "attention mask"),
        ({"attn_precision": torch.float64}, "attention in another precision"),
        ({"scale": 0.1}, "another scale of the scores"),
    ],
)
def test_calls_with_more_than_plain_attention_are_never_touched(extra, reason):
    wan = RECORDED["wan"]
    alone = Recorded(wan.model, wan.latent, wan.layout, [(80, 80, 0, "double")], {})
    session = session_of()
    played = step(session, Executor(alone, **extra))
    assert played.asked == [0]
    assert played.outputs[0].equal(dense(*played.inputs[0], HEADS, skip_reshape=True, mask=extra.get("mask")))
    assert session.report().dense_reasons() == {reason: 1}


def test_the_usual_scale_and_precision_are_sparse():
    session = session_of()
    step(session, Executor(RECORDED["wan"], scale=HEAD_DIM**-0.5, attn_precision=torch.float32))
    assert session.report().dense_reasons() == {}


def test_grouped_keys_and_other_batches_are_not_touched():
    wan, session = RECORDED["wan"], session_of()

    class Odd(Executor):
        def __call__(self, x, t, c_concat, c_crossattn, control, transformer_options, **conditions):
            q = torch.randn(1, 80, 32)
            kwargs = {"transformer_options": {**transformer_options, "block_index": 0, "block_type": "double"}}
            override = transformer_options[OVERRIDE]
            answer = lambda *args, **kw: "dense"  # noqa: E731
            assert override(answer, q, q[..., :16], q[..., :16], HEADS, enable_gqa=True, **kwargs) == "dense"
            assert override(answer, q.expand(5, 80, 32), *[q.expand(5, 80, 32)] * 2, HEADS, **kwargs) == "dense"
            assert override(answer, q, q, q, HEADS) == "dense"  # an auxiliary model that passes no options on
            return x

    step(session, Odd(wan))
    assert session.report().dense_reasons() == {"keys or values of another shape": 1}


def test_few_tokens_stay_dense():
    session = session_of(SVG(density=0.01), min_tokens=81)  # which this method could not even plan
    played = step(session, Executor(RECORDED["wan"]))
    assert len(played.asked) == 4
    assert session.report().dense_reasons() == {"min_tokens 81, above the video's 80 tokens": 2}
    step(session_of(min_tokens=80), played)
    assert len(played.asked) == 6


def test_min_tokens_at_its_default_goes_by_what_was_measured_on_this_machine(tmp_path, monkeypatch):
    """The key is that of the model's own calls; what is measured between two samplings counts in the second."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    key = Key.here(HEADS, HEAD_DIM, torch.device("cpu"), torch.float32, "svg2")
    played, session = Executor(RECORDED["wan"]), session_of(min_tokens=8192, by_length="svg2")

    def sparse() -> bool:
        before = len(played.asked)
        step(session, played)
        session.end()
        session.begin()
        return len(played.asked) - before == 2

    assert not sparse()
    (note,) = session.report().notes
    command = f"--heads {HEADS} --head-dim {HEAD_DIM} --device cpu --dtype float32 --method svg2 --threads 1"
    assert note == f"8,192 tokens are a fixed default: `vidaccel break-even {command}` measures it on this machine."
    assert set(session.report().dense_reasons()) == {"min_tokens 8192, above the video's 80 tokens"}
    store(key, BreakEven(80, 40))
    assert sparse() and any(note.startswith("min_tokens 80: On this machine") for note in session.report().notes)
    store(key, BreakEven(81, 40))
    assert not sparse() and "min_tokens 81, above the video's 80 tokens" in session.report().dense_reasons()
    # Another number is the user's own, and of a method that has none to be measured the default is what it says.
    for options in ({"min_tokens": 80, "by_length": "svg2"}, {"min_tokens": 0}):
        before = len(played.asked)
        step(session_of(**options), played)
        assert len(played.asked) - before == 2
    store(key, BreakEven(80, 40))
    step(unmeasured := session_of(min_tokens=8192), played)
    assert unmeasured.report().notes == () and len(unmeasured.report().dense_reasons()) == 1


def test_what_a_method_cannot_do_is_told_where_the_length_allows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    played = Executor(RECORDED["wan"])
    session = session_of(SVG(density=0.01), min_tokens=8192, by_length="svg")
    step(session, played)  # dense, so that nobody asks the method
    store(Key.here(HEADS, HEAD_DIM, torch.device("cpu"), torch.float32, "svg"), BreakEven(80, 40))
    session.begin()
    with pytest.raises(ValueError, match=r"density is 0\.01"):
        step(session, played)


def nag(recorded: Recorded, times: int) -> Recorded:
    """Another node's cross-attention, with as many text tokens as the video has, in every block."""
    tokens = recorded.layout.tokens
    calls = []
    for call in recorded.calls:
        calls += [call] if call[1] == tokens else [(tokens, tokens, *call[2:])] * times + [call]
    return replace(recorded, calls=calls)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["wan", "cosmos predict2"])
def test_a_further_call_under_one_block_is_not_the_models(name, times, caplog):
    recorded = nag(RECORDED[name], times)
    session = session_of(SVG2(density=0.6))
    played = step(session, Executor(recorded))
    own = [0, 2 + times]
    assert [place for place in range(len(recorded.calls)) if place not in played.asked] == own
    for place in set(range(len(recorded.calls))) - set(own):
        assert played.outputs[place].equal(dense(*played.inputs[place], HEADS, skip_reshape=True))
    assert sorted(record.layer for record in session.report().records) == [0, 1]
    notes = session.report().notes
    assert "a further call in block 0 has the video's 80 tokens" in notes[0] and notes[0] in caplog.text


def test_calls_that_are_not_numbered_are_as_many_as_the_blocks():
    wan = RECORDED["wan without block_index"]
    session = session_of()
    played = step(session, Executor(replace(wan, calls=[*wan.calls, (80, 80, None, None)])))
    assert len(wan.calls) in played.asked and {r.layer for r in session.report().records} == {0, 1}
    assert "a further call has the video's 80 tokens" in session.report().notes[0]


def test_blocks_without_self_attention_do_not_shift_the_layers():
    """LTX-2's spatio-temporal guidance, in a pass of its own."""
    ltx = RECORDED["ltx-2"]
    session = session_of(dense=DensePart(layers=frozenset([0])))
    played = step(session, Executor(replace(ltx, calls=ltx.calls[1:])), stg_self_attn_blocks=frozenset([0]))
    assert played.asked == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert [record.layer for record in session.report().records] == [1] and not session.report().dense_reasons()


def test_every_context_of_vace_has_calls_of_its_own():
    vace = RECORDED["wan vace"]
    calls = with_cross(80, [0, 0, 0, 1, 1, 1], "double")
    one, two = (session_of() for _ in range(2))
    played = step(one, Executor(replace(vace, calls=calls)))
    assert [place for place in (0, 2, 4, 6, 8, 10) if place in played.asked] == [4, 10]
    contexts = {"vace_context": torch.zeros(1, 2, 96, 5, 8, 8)}
    played = step(two, Executor(replace(vace, calls=calls, conditions=contexts)))
    assert not {0, 2, 4, 6, 8, 10} & set(played.asked) and len(two.report().records) == 6


def test_a_block_of_a_kind_that_the_model_does_not_have_is_not_the_models():
    hunyuan = RECORDED["hunyuan"]
    session = session_of()
    calls = [*hunyuan.calls, (87, 87, 0, "audio"), (87, 87, 7, "single")]
    played = step(session, Executor(replace(hunyuan, calls=calls)))
    assert played.asked == [0, 1, 6, 7] and len(session.report().records) == 4
