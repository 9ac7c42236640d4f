"""The guidance cache in Wan pipelines: which passes are made, what it goes with, and what it refuses."""

from __future__ import annotations

import copy
import functools
import re
import threading

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from families.cogvideo import cogvideox_5b
from families.others import mochi
from tiny_wan import generate, make_pipe, make_transformer

import vidaccel
from vidaccel import DenseSchedule, GuidanceCache, Preset, Tangent, accelerate, guidance_cache, restore
from vidaccel.attention import StepInfo
from vidaccel.pipelines.guidance_cache.differences import Differences
from vidaccel.pipelines.guidance_cache.passes import LeftOutPasses
from vidaccel.pipelines.hooks.diffusers_hooks import hooks_of
from vidaccel.pipelines.hooks.undo import CFG_PARALLEL, GUIDANCE_CACHE, GUIDANCE_FREE
from vidaccel.pipelines.presets import PresetError

FEW = Tangent(density=0.4, q_clusters=6, k_clusters=12)


class Counted:
    """Passes that a transformer really makes: the steps' numbers, each with how many."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.passes = 0
        transformer.patch_embedding.register_forward_hook(self._count)  # inside of the forward pass

    def _count(self, *_: object) -> None:
        self.passes += 1


@pytest.mark.parametrize(
    ("settings", "steps", "made"),
    [
        ({}, 20, 4 + 5),  # a fifth of the steps, then one in three of 16
        ({"every": 2}, 20, 4 + 8),
        ({"every": 4, "first_steps": 6}, 20, 6 + 3),
        ({"first_steps": 0}, 5, 2 + 1),  # two at the least, which the third is extrapolated from
        ({"first_steps": 5}, 5, 5),
        ({}, 2, 2),
    ],
)
def test_the_passes_that_are_made(settings, steps, made):
    pipe = make_pipe()
    counted = Counted(pipe.transformer)
    with guidance_cache(pipe, **settings) as handle:
        generate(pipe, steps=steps)
        assert counted.passes == steps + made
        notes = handle.notes()
        handle.reset()
        assert "no step" in handle.notes()[0]
    told = f"made {made} of {steps} second passes" if made < steps else f"all {steps} steps"
    assert len(notes) == 1 and told in notes[0]


@pytest.mark.parametrize(
    ("threshold", "told"),
    [(0.0, "made 4 of 10 second passes"), (1e9, "made 1 of 10 .*, and a cache over steps left out 9")],
)
def test_what_a_cache_over_steps_leaves_out_is_not_counted_as_made(threshold, told):
    pipe = make_pipe()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    with guidance_cache(pipe) as handle:
        generate(pipe, steps=10)
        (note,) = handle.notes()
        assert re.search(told, note)
        handle.reset()
        assert "no step" in handle.notes()[0]


def test_without_guidance_nothing_changes():
    pipe = make_pipe()
    plain = generate(pipe, guidance_scale=1.0, steps=6)
    with guidance_cache(pipe) as handle:
        assert generate(pipe, guidance_scale=1.0, steps=6).equal(plain)
        assert handle.notes() == ["guidance cache: no step of the transformer had two branches of guidance"]


@pytest.mark.parametrize(
    ("first_steps", "guided", "fix"),
    [
        (0, 2, "they are too few for one to be left out"),
        (0.2, 2, "they are too few for one to be left out"),
        (0.2, 4, "lower first_steps"),
    ],
)
def test_guidance_that_stops_during_a_run(first_steps, guided, fix):
    def stop(pipe, step, timestep, tensors):
        if step == guided - 1:
            pipe._guidance_scale = 1.0
        return tensors

    pipe = make_pipe()
    with guidance_cache(pipe, 2, first_steps=first_steps) as handle:
        generate(pipe, steps=20, callback_on_step_end=stop)
        (note,) = handle.notes()
    told = f"guidance was at work in {guided} of 20 steps of the transformer, which made both passes: {fix}"
    assert note == f"guidance cache: {told}"


def test_a_transformer_whose_steps_never_come():
    pipe = make_pipe(transformer_2=make_transformer(seed=1), boundary_ratio=0.0)
    with guidance_cache(pipe, 2) as handle:
        generate(pipe, steps=6)
        assert handle.notes()[1] == "guidance cache: no step of the transformer_2 was made"


def test_each_run_begins_anew():
    pipe = make_pipe()
    with guidance_cache(pipe, 2) as handle:
        first = generate(pipe, steps=6)
        generate(pipe, steps=6, seed=3)
        assert generate(pipe, steps=6).equal(first)
        with pytest.raises(ZeroDivisionError):
            generate(pipe, steps=6, callback_on_step_end=lambda p, step, t, kw: kw if step < 3 else 1 // 0)
        handle.reset()
        assert generate(pipe, steps=6).equal(first)
        assert "made 4 of 6" in handle.notes()[0]
    assert repr(handle) == "<vidaccel guidance cache: removed>"


def test_two_transformers_have_two_passes_each_at_their_start():
    pipe = make_pipe(transformer_2=make_transformer(seed=1), boundary_ratio=0.9)
    counted = [Counted(pipe.transformer), Counted(pipe.transformer_2)]
    with guidance_cache(pipe, 8, first_steps=0) as handle:
        generate(pipe, steps=10)
        notes = handle.notes()
    first = next(i for i, note in enumerate(notes) if "transformer_2" in note)
    high, low = counted[0].passes, counted[1].passes
    assert high + low < 20 and "made 2 of" in notes[first]
    steps = low - 2
    assert notes[first].endswith(f"made 2 of {steps} second passes of guidance")


@pytest.mark.parametrize("before", [True, False])
def test_sparse_attention_in_either_order(before):
    pipe = make_pipe()
    levers = [lambda: accelerate(pipe, FEW, schedule=DenseSchedule()), lambda: guidance_cache(pipe, 2)]
    handles = [make() for make in (levers if before else levers[::-1])]
    made = generate(pipe, steps=6)
    sparse = handles[0 if before else 1]
    records = sparse.report().records
    assert {(r.step, r.branch) for r in records if r.branch == "uncond"} == {(s, "uncond") for s in (0, 1, 3, 5)}
    assert {r.step for r in records if r.branch == "cond"} == set(range(6))
    assert sparse.report().notes == [] or not any("expected" in note for note in sparse.report().notes)
    restore(pipe)
    assert not hasattr(pipe, GUIDANCE_CACHE) and not made.equal(generate(pipe, steps=6))


def test_a_copy_would_compute_with_the_original():
    pipe = make_pipe()
    with guidance_cache(pipe, 2), pytest.raises(TypeError, match=r"remove\(\) on its handle"):
        copy.deepcopy(pipe)
    copy.deepcopy(pipe)


IN_A_BATCH = pytest.mark.parametrize("build", [cogvideox_5b, mochi])
"""Pipelines with both branches in a batch: the second one tells in each step whether it has them."""


def in_a_batch(pipe, prompts=("a dot",), guidance_scale=6.0):
    made = {"height": 64, "width": 96, "num_frames": 13, "num_inference_steps": 5, "guidance_scale": guidance_scale}
    generator = torch.Generator().manual_seed(0)
    return pipe(list(prompts), **made, generator=generator, output_type="latent").frames


def two_unguided(pipe):
    return in_a_batch(pipe, ("a dot", "a line"), 1.0)


@IN_A_BATCH
def test_a_copy_with_both_branches_in_a_batch_is_apart(build):
    pipe = build()
    plain, two = in_a_batch(pipe), two_unguided(pipe)
    with guidance_cache(pipe, 2, first_steps=0) as handle:
        made, notes = in_a_batch(pipe), handle.notes()
        other = copy.deepcopy(pipe)
    assert "made 3 of 5" in notes[0] and not made.equal(plain)
    # On some CPUs the last bits of a product depend on where in memory its weights begin.
    alike = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=0.0)
    alike(two_unguided(other), two)
    two_unguided(pipe)
    alike(in_a_batch(other), made)
    restore(other)
    alike(in_a_batch(other), plain)
    assert in_a_batch(pipe).equal(plain) and (made - plain).abs().max() > 1e-3


@IN_A_BATCH
def test_the_pipeline_that_runs_says_whether_it_guides(build):
    """Not the one that was given, which may never have run, or with another scale."""
    first = build()
    plain = two_unguided(first)
    pipe, other = type(first).from_pipe(first), type(first).from_pipe(first)
    with guidance_cache(pipe, 2, first_steps=0) as handle:
        assert two_unguided(other).equal(plain)
        made = in_a_batch(pipe)
        assert two_unguided(other).equal(plain)
        handle.reset()
        assert in_a_batch(other).equal(made) and "made 3 of 5" in handle.notes()[0]
        two_unguided(pipe)
        handle.reset()
        assert in_a_batch(other).equal(made) and "made 3 of 5" in handle.notes()[0]
    assert not in_a_batch(other).equal(made)


@IN_A_BATCH
def test_in_a_loop_of_ones_own_the_pipeline_says_what_it_last_knew(build):
    pipe, calls = build(), []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    in_a_batch(pipe)
    hook.remove()
    fresh = build()
    fresh.scheduler.set_timesteps(5)

    @torch.no_grad()
    def loop(transformer):
        for args, kwargs in calls:
            transformer(*args, **kwargs)

    with guidance_cache(pipe, 2, first_steps=0) as handle:
        loop(pipe.transformer)
        assert handle.notes() == ["guidance cache: the transformer made 3 of 5 second passes of guidance"]
        loop(copy.deepcopy(pipe.transformer))  # which brings no pipeline along, and knows nothing
        handle.reset()
        thread = threading.Thread(target=loop, args=(pipe.transformer,))
        thread.start()
        thread.join()
        assert "made 3 of 5" in handle.notes()[0]
        two_unguided(pipe)
        handle.reset()
        loop(pipe.transformer)
        assert "no step of the transformer" in handle.notes()[0]
    with guidance_cache(fresh, 2, first_steps=0) as handle:
        loop(fresh.transformer)
        (note,) = handle.notes()
        assert "5 passes of the transformer were made outside of a call" in note and "computed in full" in note
        handle.reset()
        assert "no step of the transformer" in handle.notes()[0]
        in_a_batch(fresh)
        assert "made 3 of 5" in handle.notes()[0]


@IN_A_BATCH
def test_in_a_loop_of_ones_own_two_videos_are_no_branches(build):
    """In a batch, where the pipeline last knew of guidance."""
    pipe, calls = build(), []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, *given: calls.append(given), with_kwargs=True)
    two_unguided(pipe)
    hook.remove()

    @torch.no_grad()
    def loop() -> list[torch.Tensor]:
        pipe.scheduler.set_timesteps(5)
        return [pipe.transformer(*args, **{**kwargs, "return_dict": False})[0] for args, kwargs in calls]

    expected = loop()
    with guidance_cache(pipe, 2, first_steps=0) as handle:
        in_a_batch(pipe)
        handle.reset()
        assert all(map(torch.equal, loop(), expected))
        assert handle.notes() == [
            "guidance cache: 5 passes of the transformer were made outside of a call of the pipeline, of two videos "
            "and not two branches of one: they were computed in full"
        ]


def test_in_a_loop_of_ones_own_two_videos_are_no_passes_of_one():
    pipe = make_pipe()
    videos = torch.randn(2, 1, 4, 2, 8, 8)

    @torch.no_grad()
    def loop(branches) -> list[torch.Tensor]:
        pipe.scheduler.set_timesteps(6)
        made = []
        for t in pipe.scheduler.timesteps:
            text = torch.ones(1, 6, 16)
            made += [pipe.transformer(x, t[None], text * n, return_dict=False)[0] for n, x in enumerate(branches)]
        return made

    apart, guided = loop(videos), loop([videos[0], videos[0].clone()])
    with guidance_cache(pipe, 2, first_steps=0) as handle:
        assert all(map(torch.equal, loop(videos), apart))
        (note,) = handle.notes()
        assert "6 passes of the transformer were made outside" in note and "computed in full" in note
        handle.reset()
        assert not all(map(torch.equal, loop([videos[0], videos[0].clone()]), guided))
        assert handle.notes()[0].startswith("guidance cache: the transformer made ")


def test_training_makes_every_pass():
    pipe = make_pipe()
    counted = Counted(pipe.transformer)
    with guidance_cache(pipe, 2, first_steps=0) as handle:
        x = torch.randn(1, 4, 2, 8, 8)
        text = torch.randn(1, 6, 16)
        for _ in range(6):
            pipe.transformer(x, torch.tensor([5.0]), text)[0].sum().backward()
        assert counted.passes == 6 and "no step" in handle.notes()[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": 1}, "every is 1"),
        ({"every": 2.5}, "every is 2.5"),
        ({"every": True}, "every is True"),
        ({"first_steps": -1}, "GuidanceCache.first_steps is -1"),
        ({"first_steps": 1.5}, "at most 1.0"),
        ({"extrapolation": 1.01}, "extrapolation is 1.01: it must lie between 0 and 1"),
        ({"extrapolation": "a"}, "extrapolation is 'a': it must be a number"),
        ({"extrapolation": float("nan")}, "extrapolation is nan"),
    ],
)
def test_settings_out_of_bounds(settings, words):
    with pytest.raises(ValueError, match=words):
        GuidanceCache(**settings)


def test_what_it_refuses():
    pipe = make_pipe()
    with pytest.raises(TypeError, match="every beside it"):
        guidance_cache(pipe, GuidanceCache(), every=2)
    with pytest.raises(TypeError, match="no supported transformer|is no|has no"):
        guidance_cache(object())
    for name, words in ((GUIDANCE_FREE, "guidance-free"), (CFG_PARALLEL, "cfg_parallel")):
        setattr(pipe, name, object())
        with pytest.raises(RuntimeError, match=words):
            guidance_cache(pipe)
        delattr(pipe, name)
    with guidance_cache(pipe):
        with pytest.raises(RuntimeError, match="has a guidance cache already"):
            guidance_cache(pipe)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        generate(pipe)  # its hooks are on the blocks, inside
        pipe.transformer.disable_cache()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(RuntimeError, match="compiled as a whole"):
        guidance_cache(pipe)


def test_a_transformer_that_another_pipeline_shares_has_one_cache():
    shared = make_transformer(seed=1)
    first, both = make_pipe(transformer=shared), make_pipe(transformer_2=shared, boundary_ratio=0.9)
    handle = guidance_cache(first, 2)
    before = generate(first, steps=6)
    with pytest.raises(RuntimeError, match="transformer_2 of this WanPipeline has a guidance cache already"):
        guidance_cache(both, 2)
    with pytest.raises(PresetError, match="transformer_2 of this WanPipeline has a guidance cache already"):
        vidaccel.apply(both, Preset(guidance_cache=2))
    assert not hooks_of(both.transformer) and not hasattr(both, GUIDANCE_CACHE)
    assert generate(first, steps=6).equal(before)
    handle.remove()
    guidance_cache(both, 2).remove()
    batch = mochi()
    with guidance_cache(batch, 2), pytest.raises(RuntimeError, match="has a guidance cache already"):
        guidance_cache(type(batch).from_pipe(batch), 2)


def test_a_transformer_that_is_replaced_is_told(caplog):
    pipe = make_pipe()
    handle = guidance_cache(pipe, 2)
    generate(pipe, steps=4)
    assert not any("replaced" in note for note in handle.notes())
    pipe.transformer = make_transformer(seed=1)
    (note,) = [note for note in handle.notes() if "replaced" in note]
    assert note.startswith("transformer was replaced after guidance_cache, and the new one makes all passes: remove()")
    handle.remove()
    assert [record.getMessage() for record in caplog.records].count(note) == 1


def test_one_that_cannot_be_put_on_the_second_transformer_leaves_the_first(monkeypatch):
    pipe = make_pipe(transformer_2=make_transformer(seed=1), boundary_ratio=0.9)
    install = LeftOutPasses.install

    def fails(hook, transformer):
        if transformer is pipe.transformer_2:
            raise ZeroDivisionError
        install(hook, transformer)

    with monkeypatch.context() as patch:
        patch.setattr(LeftOutPasses, "install", fails)
        with pytest.raises(ZeroDivisionError):
            guidance_cache(pipe, 2)
    assert not hooks_of(pipe.transformer) and not hasattr(pipe, GUIDANCE_CACHE)


def test_a_hook_around_it_is_refused():
    from diffusers import SeaCacheConfig

    pipe = make_pipe()
    with guidance_cache(pipe):
        pipe.transformer.enable_cache(SeaCacheConfig(threshold=0.1))
        plain = generate(pipe, guidance_scale=1.0)  # has no second pass
        with pytest.raises(RuntimeError, match="sea_cache_root was put on transformer after guidance_cache"):
            generate(pipe)
        assert generate(pipe, guidance_scale=1.0).equal(plain)
    pipe.transformer.disable_cache()
    with vidaccel.apply(pipe, Preset(guidance_cache=2)):
        pipe.transformer.enable_cache(SeaCacheConfig(threshold=0.1))
        with pytest.raises(RuntimeError, match=r"after apply, .* remove\(\) the handle and call apply again, last"):
            generate(pipe)


def test_an_unknown_number_of_steps():
    differences = Differences(GuidanceCache())
    x = [torch.zeros(2)]
    for step in range(2):
        assert differences.wanted(StepInfo(0, step, None), [x[0].shape])
        differences.add(StepInfo(0, step, None), x, x)
    assert differences.wanted(StepInfo(0, 2, None), [x[0].shape]) and differences.uncounted == 1
    differences = Differences(GuidanceCache(first_steps=1))
    for step in range(2):
        differences.add(StepInfo(-1, step, None), x, x)
    assert not differences.wanted(StepInfo(-1, 2, None), [x[0].shape])


def test_outputs_of_another_shape_begin_anew():
    differences = Differences(GuidanceCache(2, first_steps=0))
    for step in range(2):
        differences.add(StepInfo(0, step, 9), [torch.ones(2)], [torch.zeros(2)])
    assert not differences.wanted(StepInfo(-1, 2, 9), [torch.Size([2])])
    assert differences.wanted(StepInfo(-1, 2, 9), [torch.Size([3])])
    assert differences.wanted(StepInfo(-1, 2, 9), [torch.Size([2])])  # nothing is kept any more


def test_the_difference_goes_on_by_half():
    differences = Differences(GuidanceCache(4, first_steps=0))
    for step, value in ((0, 1.0), (2, 3.0)):
        differences.add(StepInfo(0, step, 9), [torch.tensor([value], dtype=torch.bfloat16)], [torch.zeros(1)])
    (made,) = differences.second(StepInfo(0, 4, 9), [torch.tensor([10.0], dtype=torch.bfloat16)])
    assert made.dtype == torch.bfloat16 and made.item() == 10 - (3 + 0.5 * 2)
    assert vidaccel.GuidanceCache is GuidanceCache


def test_a_difference_that_is_too_old_is_made_anew():
    """Steps that made one pass alone, without asking, count as well."""
    differences = Differences(GuidanceCache(3, first_steps=0))
    for step in range(2):
        differences.add(StepInfo(-1, step, 30), [torch.ones(2)], [torch.zeros(2)])
    asked = [differences.wanted(StepInfo(-1, step, 30), [torch.Size([2])]) for step in (2, 3, 4, 22)]
    assert asked == [False, False, True, True]


def test_nothing_of_it_is_left_in_the_transformer():
    """Neither where diffusers' own hooks stay, which keep the forward of theirs."""
    pipe = make_pipe()
    for other in (False, True):
        if other:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        before = pipe.transformer.__dict__.get("forward")
        guidance_cache(pipe, 2).remove()
        assert pipe.transformer.__dict__.get("forward") is before


def test_a_run_that_failed_is_told_once(caplog):
    """Sparse attention, the preset and the guidance cache each count its steps."""
    pipe = make_pipe()

    def fail(*_):
        raise ArithmeticError

    with vidaccel.apply(pipe, Preset(method=FEW, cache="forecast", guidance_cache=2)), caplog.at_level("WARNING"):
        with pytest.raises(ArithmeticError):
            generate(pipe, steps=5, callback_on_step_end=fail)
        generate(pipe, steps=5)
    assert len([message for message in caplog.messages if "steps seen 1, expected 5" in message]) == 1


def test_a_handle_that_was_removed_is_not_entered():
    pipe = make_pipe()
    for make in (
        lambda: accelerate(pipe, FEW),
        lambda: guidance_cache(pipe, 2),
        lambda: vidaccel.apply(pipe, Preset()),
    ):
        handle = make()
        handle.remove()
        with pytest.raises(RuntimeError, match="this handle was removed, and changes nothing any more"), handle:
            pass
