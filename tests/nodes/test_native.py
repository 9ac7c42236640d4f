"""The attention override against recorded calls of every native model, without ComfyUI.

`test_native_comfyui.py` runs the models themselves.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native_calls import HEAD_DIM, HEADS, RECORDED, WAN, Executor, Recorded, dense, model_of, with_cross

from vidaccel import SVG, SVG2, Radial, Sparge, Tangent, VideoLayout, sparse_attention
from vidaccel.attention import PlanMemory
from vidaccel.nodes.native import KEY, OVERRIDE, NativeAttention
from vidaccel.nodes.news import CACHED, NEVER
from vidaccel.nodes.sampling import DensePart
from vidaccel.nodes.tables import report_text
from vidaccel.nodes.wording import said_by

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def session_of(method=None, **options: Any) -> NativeAttention:
    method = method or SVG2(density=0.6)
    return NativeAttention(
        method if callable(method) else lambda layout: method,
        name="test",
        settings={"compensate": None, "key_clusters": None},
        **{"dense": DensePart(), **options},
    )


def step(session: NativeAttention, executor: Executor, sigma: float = 0.5, **options: Any) -> Executor:
    """One forward pass."""
    recorded = executor.recorded
    x = torch.zeros(len(executor.seeds), 16, *recorded.latent)
    text = torch.zeros(len(executor.seeds), recorded.text, 8)
    given = {"sigmas": torch.tensor([sigma]), "sample_sigmas": SIGMAS, "cond_or_uncond": [0], **options}
    session.forward(executor, x, torch.tensor([sigma]), None, text, None, given, **recorded.conditions)
    return executor


def expected(method, q, k, v, layout, flat: bool) -> torch.Tensor:
    """What the override must give: `sparse_attention` with the method's plan, each batch entry on its own."""
    outs = []
    for one in zip(*(x.split(1) for x in (q, k, v)), strict=True):
        outs.append(sparse_attention(*one, method.plan(*one, layout, PlanMemory())))
    out = torch.cat(outs)
    return out.transpose(1, 2).flatten(2) if flat else out


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


def run(session: NativeAttention, recorded: Recorded, passes: list[dict[str, Any]]) -> dict[tuple, torch.Tensor]:
    """A run of four steps; the last self-attention output of each step and batch entry, by seed."""
    session.begin()
    outputs = {}
    for sigma in SIGMAS[:-1].tolist():
        for one in passes:
            seeds = [round(10 * sigma) + seed * 100 for seed in one["seeds"]]
            played = step(session, Executor(recorded, seeds=seeds), sigma, **one["options"])
            for entry, seed in enumerate(one["seeds"]):
                outputs[sigma, seed] = played.outputs[list(recorded.video)[-1]][entry]
    session.end()
    return outputs


BATCHED = [{"seeds": [1, 2], "options": {"cond_or_uncond": [1, 0], "uuids": ["n", "p"]}}]
SEPARATE = [
    {"seeds": [2], "options": {"cond_or_uncond": [0], "uuids": ["p"]}},
    {"seeds": [1], "options": {"cond_or_uncond": [1], "uuids": ["n"]}},
]


@pytest.mark.parametrize("method", [SVG2(density=0.6), SVG(density=0.6)])
def test_branches_in_one_batch_equal_branches_apart(recorded, method):
    batched, separate = run(session_of(method), recorded, BATCHED), run(session_of(method), recorded, SEPARATE)
    for key, value in batched.items():
        torch.testing.assert_close(value, separate[key], msg=str(key))


def test_two_prompts_of_one_side_have_a_state_each():
    session = session_of()
    options = {"cond_or_uncond": [1, 0, 0], "uuids": ["n", "p", "q"]}
    step(session, Executor(RECORDED["wan"], 3), **options)
    assert {r.branch for r in session.report().records} == {"cond", "cond #2", "uncond"}
    apart = session_of()
    for entry, (kind, uuid) in enumerate(zip(*options.values(), strict=True)):
        step(apart, Executor(RECORDED["wan"], seeds=[entry]), cond_or_uncond=[kind], uuids=[uuid])
    assert len(apart._engines[RECORDED["wan"].layout]._call_memory) == 6


def test_a_latent_batch_stays_together_within_a_branch():
    session = session_of()
    step(session, Executor(RECORDED["wan"], 4), cond_or_uncond=[0, 1])
    assert {key[2] for key in session._engines[RECORDED["wan"].layout]._call_memory} == {(2, HEADS)}


def test_a_run_begins_without_the_state_of_the_last():
    wan = RECORDED["wan"]
    session, fresh = session_of(), session_of()
    run(session, wan, [{"seeds": [7], "options": {}}])
    assert not session._engines[wan.layout]._call_memory  # gigabytes on a large model
    first = run(fresh, wan, BATCHED)
    for key, value in run(session, wan, BATCHED).items():
        assert value.equal(first[key])
    assert session.report().runs() == [0, 1]


def test_an_interrupted_run_leaves_nothing_behind():
    class Interrupted(Executor):
        def __call__(self, *args, **kwargs):
            super().__call__(*args, **kwargs)
            raise KeyboardInterrupt

    wan, session = RECORDED["wan"], session_of()
    session.begin()
    with pytest.raises(KeyboardInterrupt):
        step(session, Interrupted(wan, seeds=[5]), sigma=1.0)
    session.end()
    fresh = run(session_of(), wan, BATCHED)
    for key, value in run(session, wan, BATCHED).items():
        assert value.equal(fresh[key])


def test_another_resolution_has_its_own_plan():
    session = session_of(lambda layout: Radial.for_density(layout, 0.7))
    for name in ("wan", "wan odd size", "wan"):
        recorded = RECORDED[name]
        session.begin()
        played = step(session, Executor(recorded))
        method = Radial.for_density(recorded.layout, 0.7)
        for place in recorded.video:
            torch.testing.assert_close(
                played.outputs[place], expected(method, *played.inputs[place], recorded.layout, flat=True)
            )
    assert list(session._engines) == [RECORDED["wan"].layout, RECORDED["wan odd size"].layout]
    assert session.report().runs() == [0, 1, 2]


def test_an_unknown_model_stays_dense_and_says_so_once(caplog):
    unknown = Recorded(model_of("HumoWanModel", **WAN), (5, 8, 8), VideoLayout(5, 4, 4), RECORDED["wan"].calls, {})
    session = session_of()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            played = step(session, Executor(unknown))
            for inputs, out in zip(played.inputs, played.outputs, strict=True):
                assert out.equal(dense(*inputs, HEADS, skip_reshape=True))
    assert len(caplog.records) == 1 and "HumoWanModel is no model" in caplog.text and "Wan VACE" in caplog.text
    assert session.report().records == () and "HumoWanModel" in session.report().notes[0]


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


@pytest.mark.parametrize(
    ("method", "name", "said"),
    [
        (
            SVG(density=0.01),
            "wan",
            "density is 0.01, and with a video of 5 frames of 4x4 it must be at least 0.11. Raise it.",
        ),
        (
            lambda layout: Radial.for_density(layout, 0.01),
            "hunyuan",
            r"density is 0.01, and with a video of 5 frames of 4x4 with 7 tokens of text or references it must be at "
            r"least 0.\d+. Raise it.",
        ),
        (
            SVG2(density=0.1, compensate=True),
            "wan",
            "density is 0.1, and with a video of 5 frames of 4x4 it must be at least 0.21. Raise it, switch "
            "compensate off, or take fewer key_clusters.",
        ),
        (
            Tangent(density=0.1),
            "wan",
            "density is 0.1, and with a video of 5 frames of 4x4 it must be at least 0.21. Raise it, or take fewer "
            "key_clusters.",
        ),
        (
            lambda layout: Sparge.for_density(layout, 0.1),
            "wan",
            "density is 0.1, and with a video of 5 frames of 4x4 it must be at least 0.51. Raise it.",
        ),
        (SVG2(density=0.1), "hunyuan", "density is 0.1, .* it must be at least 0.16. Raise it."),
        (
            SVG2(density=0.5, q_clusters=81),
            "wan",
            "query_clusters is 81, and with a video of 5 frames of 4x4 it must be at most 80. Lower it.",
        ),
    ],
)
def test_what_a_method_cannot_do_is_said_in_the_words_of_its_node_before_the_model_works(method, name, said):
    executor = Executor(RECORDED[name])
    with pytest.raises(ValueError, match=rf"^Sparse Attention \(test\): {said}$"):
        step(session_of(method), executor)
    assert not executor.inputs


def test_the_bound_that_is_said_can_be_followed():
    """And what lies more than one step of the input below it cannot."""
    for make in (
        lambda d: SVG(density=d),
        lambda d: SVG2(density=d, compensate=True),
        lambda d: Tangent(density=d),
    ):
        with pytest.raises(ValueError, match="at least") as refused:
            step(session_of(make(0.01)), Executor(RECORDED["wan"]))
        least = float(str(refused.value).partition("at least ")[2].split(". ")[0])
        step(session_of(make(least)), Executor(RECORDED["wan"]))
        with pytest.raises(ValueError, match="at least"):
            step(session_of(make(least - 0.011)), Executor(RECORDED["wan"]))


def test_what_fails_in_a_call_is_said_with_the_name_of_the_node():
    class Broken(Executor):
        def _tensor(self, tokens, number):
            return super()._tensor(tokens, number) * float("nan")

    with pytest.raises(ValueError, match=r"^Sparse Attention \(test\): .* values of q are NaN or infinite in layer 0"):
        step(session_of(), Broken(RECORDED["wan"]))
    with pytest.raises(RuntimeError, match=r"^Sparse Attention \(test\): backend 'flex' cannot run this call: it"):
        step(session_of(SVG2(density=0.6, compensate=True), backend="flex"), Executor(RECORDED["wan"]))


def test_an_error_of_another_class_keeps_its_class():
    """ComfyUI frees memory and shows a help text for one, by its class."""
    with pytest.raises(torch.OutOfMemoryError, match="^all gone$"), said_by("Sparse Attention"):
        raise torch.OutOfMemoryError("all gone")


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


def test_steps_by_percentage_of_the_schedule():
    session = session_of(dense=DensePart(start=0.25, end=0.25))
    run(session, RECORDED["wan"], BATCHED)
    report = session.report()
    assert [density == 1 for density in report.density_by_step().values()] == [True, False, False, True]
    assert {r.num_steps for r in report.records} == {4}
    assert report.dense_reasons() == {"dense_start_percent": 4, "dense_end_percent": 4}


def test_steps_are_counted_without_a_table_of_sigmas():
    session = session_of()
    session.begin()
    for sigma in (0.9, 0.9, 0.4):
        step(session, Executor(RECORDED["wan"]), sigma, sample_sigmas=None)
    assert [r.step for r in session.report().records] == [0, 0, 0, 0, 1, 1]


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


def test_records_do_not_pile_up():
    session = session_of(dense=DensePart(start=0.5))
    for _ in range(11):
        run(session, RECORDED["wan"], BATCHED)
    assert session.report().runs() == list(range(3, 11))
    assert len(session._dense_calls) == 8 * 2 * 2


@pytest.mark.parametrize(
    ("options", "message"), [({"min_tokens": -1}, "min_tokens is -1"), ({"backend": "cudnn"}, "unknown backend")]
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        session_of(**options)


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
