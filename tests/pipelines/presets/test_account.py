"""Caches and schedules in one run: a dense step is computed, and each step is told as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import MagCacheConfig, WanImageToVideoPipeline, WanPipeline, WanVideoToVideoPipeline
from eager_caches import EAGER, RATIOS
from gft_adapters import write_adapter
from gft_calls import loaded, made, saved
from tiny_families import build
from tiny_pipelines import hunyuan, kandinsky5, run
from tiny_wan import generate, make_pipe, make_transformer
from torch.utils._pytree import tree_leaves, tree_map

import vidaccel
from vidaccel import SVG2, DenseSchedule, Preset
from vidaccel.pipelines import find_transformers
from vidaccel.pipelines.acceleration.clock import StepClock
from vidaccel.pipelines.acceleration.families import Family
from vidaccel.pipelines.presets import Cache, measure_mag_ratios
from vidaccel.pipelines.presets.account import PassRecord, accounts
from vidaccel.pipelines.presets.caches import check_cache, install_cache
from vidaccel.pipelines.presets.errors import PresetError


def preset(cache: Cache | None, **schedule) -> Preset:
    method = SVG2(top_p=0.5, schedule=DenseSchedule(**schedule))
    return Preset(method=method, backend="reference", cache=cache)


def placed(model: torch.nn.Module) -> tuple[Family, StepClock]:
    """The family of a transformer that is in no pipeline, and a clock."""
    ((_, family),) = find_transformers(model).values()
    return family, StepClock(None)


def skipped(account) -> list[int]:
    return [step.step for step in account.steps if step.skipped]


@pytest.mark.parametrize(
    ("schedule", "dense"),
    [
        ({"first_steps": 2, "last_steps": 1}, [0, 1, 7]),
        ({"first_steps": 0.25, "last_steps": 0.125}, [0, 1, 7]),
        ({"sigma_above": 0.9, "sigma_below": 0.4}, [0, 1, 2, 7]),
    ],
)
def test_a_cache_skips_no_step_that_is_kept_dense(pipe, cache, schedule, dense):
    with vidaccel.apply(pipe, preset(cache, **schedule)) as handle:
        for number in (0, 1):  # and the second run like the first
            generate(pipe, 8)
            account = handle.report().last()
            assert [step.step for step in account.steps if step.attention == "dense"] == dense, number
            assert len(skipped(account)) >= 3 and not set(skipped(account)) & set(dense)
            assert all(step.forwards == 2 == step.computed + step.skipped for step in account.steps)


def test_a_run_that_is_broken_off_leaves_nothing_to_the_next(pipe, cache):
    def stop(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with vidaccel.apply(pipe, preset(cache)):
        wanted = generate(pipe, 4, size=32)
    with vidaccel.apply(pipe, preset(cache)):
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, 4, callback_on_step_end=stop)
        assert torch.equal(generate(pipe, 4, size=32), wanted)  # of another size, as after running out of memory


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "transformer"])
def test_a_copy_is_refused_while_a_cache_is_at_work(pipe, cache, whole):
    """Its hooks would compute with the layers of the original."""
    handle = vidaccel.apply(pipe, preset(cache, first_steps=1))
    wanted = generate(pipe, 4)
    with pytest.raises(TypeError, match=r"has a cache .* cannot be copied: call remove\(\) .* apply the preset to"):
        copy.deepcopy(pipe if whole else pipe.transformer)
    assert torch.equal(generate(pipe, 4), wanted)
    handle.remove()
    copied = copy.deepcopy(pipe) if whole else make_pipe(transformer=copy.deepcopy(pipe.transformer))
    with vidaccel.apply(copied, preset(cache, first_steps=1)):
        assert torch.equal(generate(copied, 4), wanted)


@pytest.mark.parametrize(
    "share", [WanPipeline.from_pipe, lambda pipe: type(pipe)(**pipe.components)], ids=["from_pipe", "class"]
)
def test_a_pipeline_that_shares_the_transformer_has_the_cache_with_it(pipe, cache, share):
    with vidaccel.apply(pipe, preset(cache, first_steps=1)) as handle:
        wanted = generate(pipe, 5)
        other = WanPipeline.from_pipe(pipe) if share == "from_pipe" else type(pipe)(**pipe.components)
        assert torch.equal(generate(other, 5), wanted) and handle.report().runs() == [0, 1]
        assert len(skipped(handle.report().last())) >= 2
        assert torch.equal(generate(pipe, 5), wanted)
    assert not torch.equal(generate(other, 5), wanted)


def test_without_a_schedule_the_last_step_may_be_skipped(pipe, cache):
    """What the tests above hold only because the cache is told."""
    with vidaccel.apply(pipe, preset(cache)) as handle:
        generate(pipe, 8)
        assert skipped(handle.report())
        assert all(step.attention in ("sparse", "-") for step in handle.report().steps)


def test_a_step_of_which_one_pass_was_skipped_is_told_in_half():
    passes = [PassRecord(0, 1, 4, branch, "transformer", branch == "uncond") for branch in ("cond", "uncond")]
    (step,) = accounts(passes, None)
    assert (step.forwards, step.computed, step.skipped, step.attention) == (2, 1, 1, "stock")


@pytest.mark.parametrize("steps", [4, 12])
def test_the_ratios_of_magcache_are_those_of_the_run(pipe, steps):
    """Of a cache that was told of 4 steps, in a run of 12: the ratio of each step, and no step is taken for another."""
    ratios = [1.0, 1.0, 5.0, 1.0]  # the third quarter of a run cannot be skipped
    with vidaccel.apply(pipe, Preset(cache=Cache("magcache", 0.5, {**RATIOS, "mag_ratios": ratios}))) as handle:
        generate(pipe, steps)
        account = handle.report()
        quarter = {round(step.step * 3 / (steps - 1)) for step in account.steps if step.computed}
    assert 2 in quarter and {step.step for step in account.steps} == set(range(steps))


def test_a_run_that_was_broken_off_leaves_nothing_to_the_next(pipe, cache):
    with vidaccel.apply(pipe, preset(cache, first_steps=1)) as handle:
        whole = generate(pipe, 6)

        def stop(pipe, step, timestep, tensors):
            if step == 2:
                raise InterruptedError
            return tensors

        with pytest.raises(InterruptedError):
            generate(pipe, 6, callback_on_step_end=stop)
        assert torch.equal(generate(pipe, 6), whole)
        assert handle.report().last().steps[0].attention == "dense"


def test_one_pass_a_step_with_every_cache(cache, tmp_path):
    """Guidance in one pass: cache-dit must not take each second step for the other branch."""
    pipe = loaded(saved(tmp_path / "base"))
    adapter = write_adapter(tmp_path, tmp_path / "base", make_transformer())
    chosen = preset(cache, first_steps=1, last_steps=1).replace(guidance_free=(str(adapter),))
    with vidaccel.apply(pipe, chosen) as handle:
        made(pipe, 3.0, steps=8)
        account = handle.report()
    assert [step.forwards for step in account.steps] == [1] * 8
    assert [s.attention for s in account.steps if s.step in (0, 7)] == ["dense"] * 2
    assert len(skipped(account)) >= 2 and not set(skipped(account)) & {0, 7}


def test_two_transformers_are_one_account(cache):
    """The second begins in the middle of a run, and its last steps are the run's."""
    pipe = make_pipe(transformer_2=make_transformer(1), boundary_ratio=0.8)
    with vidaccel.apply(pipe, preset(cache, first_steps=1, last_steps=2)) as handle:
        for number in (0, 1):
            generate(pipe, 10)
            account = handle.report().last()
            assert [step.step for step in account.steps] == list(range(10)), number
            assert [step.step for step in account.steps if step.attention == "dense"] == [0, 8, 9], number
            # Each transformer has to make three passes before any can be forecast.
            assert len(skipped(account)) >= (2 if cache.name == "forecast" else 3)
            assert not set(skipped(account)) & {0, 8, 9}
            assert not [note for note in account.notes if "a cache skipped" in note]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", ["first_block", "magcache", "cache_dit"])
def test_a_pipeline_that_does_not_say_whether_it_guides(name, passes):
    """HunyuanVideo has one pass a step or two, by what its call gets."""
    if name == "cache_dit":
        pytest.importorskip("cache_dit")
    pipe, options = hunyuan()
    assert not hasattr(pipe, "do_classifier_free_guidance")
    negative = {f"negative_{key}": value for key, value in options.items() if "prompt" in key}
    more = {**negative, "true_cfg_scale": 4.0} if passes == 2 else {}
    with vidaccel.apply(pipe, preset(EAGER[name], first_steps=1, last_steps=2)) as handle:
        run(pipe, options, steps=8, **more)
        account = handle.report()
    assert [step.forwards for step in account.steps] == [passes] * 8
    assert [step.step for step in account.steps if step.attention == "dense"] == [0, 6, 7]
    assert len(skipped(account)) >= 3 and not set(skipped(account)) & {0, 6, 7}
    assert not [note for note in account.notes if "a cache skipped" in note]


def test_branches_that_a_pipeline_does_not_name():
    """Kandinsky 5 does not tell caches which pass is which: what one has kept is not put in place of the other."""
    pipe, options = kandinsky5(layers=2)
    cache = Cache("magcache", 10.0, {**RATIOS, "max_skip_steps": 2})
    with vidaccel.apply(pipe, preset(cache, first_steps=1, last_steps=1)) as handle:
        run(pipe, options, steps=8)
        account = handle.report()
    assert [(step.computed, step.skipped) for step in account.steps] == [*[(2, 0), (0, 2), (0, 2)] * 2, (2, 0), (2, 0)]


@pytest.mark.parametrize("layers", [2, 3])
def test_the_first_block_cache_on_kandinsky_5(layers):
    """Its blocks have a name of their own for their states."""
    pipe, options = kandinsky5(layers=layers)
    with vidaccel.apply(pipe, preset(EAGER["first_block"], first_steps=1, last_steps=1)) as handle:
        run(pipe, options, steps=4)
        account = handle.report()
    assert [(step.computed, step.skipped) for step in account.steps] == [(2, 0), (0, 2), (0, 2), (2, 0)]


@pytest.mark.parametrize("cls", [WanVideoToVideoPipeline, WanImageToVideoPipeline])
def test_seacache_in_pipelines_that_do_not_say_where_their_loop_is(cls, vae):
    """Neither the branch nor the step, or the branch alone, as image to video of Wan 2.2 5B."""
    if cls is WanVideoToVideoPipeline:
        pipe, given = make_pipe(cls), {"latents": torch.randn(1, 4, 5, 8, 8), "strength": 0.5, "video": None}
    else:
        pipe = make_pipe(cls, vae=vae, image_processor=None, image_encoder=None, expand_timesteps=True)
        given = {"image": torch.zeros(1, 3, 64, 64)}
    with vidaccel.apply(pipe, preset(EAGER["seacache"], first_steps=1, last_steps=1)) as handle:
        for number in (0, 1):
            generate(pipe, 12 if "strength" in given else 6, **given)
            account = handle.report().last()
            assert [(step.computed, step.skipped) for step in account.steps] == [(2, 0), *[(0, 2)] * 4, (2, 0)], number


def idle(account) -> list[str]:
    return [note for note in account.notes if "skipped no pass" in note]


def test_a_cache_that_skips_nothing_says_so_and_what_to_raise(pipe):
    timid = {
        Cache("first_block", 0.0): "with a threshold of 0, skipped no pass: raise the threshold",
        Cache("magcache", 0.0, RATIOS | {"mag_ratios": [0.5] * 4}): "raise the threshold, or lower retention_ratio",
        Cache("seacache", 0.0): "raise the threshold, or lower retention_steps or cache_end_steps",
        Cache("taylorseer", 3, {"disable_cache_before_step": 9}): "more steps, or lower disable_cache_before_step",
    }
    for cache, said in timid.items():
        with vidaccel.apply(pipe, Preset(cache=cache)) as handle:
            assert not idle(handle.report())
            generate(pipe, 4)
            (note,) = idle(handle.report())
            assert note.startswith(f"the cache {cache.name}, ") and note.endswith(said)
            assert note in handle.report().own_notes


def test_the_runs_of_which_a_cache_skipped_nothing(pipe):
    with vidaccel.apply(pipe, preset(EAGER["first_block"], first_steps=2)) as handle:
        generate(pipe, 1)  # of which nothing could be
        generate(pipe, 4)
        assert not idle(handle.report())
        generate(pipe, 2)
        (note,) = idle(handle.report())
        assert note.endswith(
            "skipped no pass of run 2: the schedule of sparse attention keeps all steps dense; keep fewer"
        )
        assert note in handle.report().own_notes
    with vidaccel.apply(pipe, preset(Cache("first_block", 0.0), first_steps=2)) as handle:
        generate(pipe, 4)
        assert "raise the threshold (the schedule keeps 2 of its 6 passes dense)" in idle(handle.report())[0]


def test_magcache_skips_as_much_after_steps_that_are_kept(pipe):
    """Steps that it computes by itself, at the start, are no skipped ones because they are kept, too."""
    cache = Cache("magcache", 10.0, {"mag_ratios": [1.0] * 10, "max_skip_steps": 3, "retention_ratio": 0.2})
    found = []
    for kept in (0, 2):
        with vidaccel.apply(pipe, preset(cache, first_steps=kept)) as handle:
            generate(pipe, 10)
            found.append(skipped(handle.report()))
    assert found == [[2, 3, 4, 6, 7, 8]] * 2


FAMILIES = ["wan_vace", "hunyuan_video_15", "cogvideox_2b", "ltx2", "kandinsky5", "kandinsky6", "minimax_h3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_taylorseer_extrapolates_all_that_a_model_makes(name):
    """To order 0 a skipped pass makes what the one before made, its sound too, whatever it is given."""
    tiny = build(name)
    cache = Cache("taylorseer", 100, {"max_order": 0, "disable_cache_before_step": 1})
    check_cache("transformer", tiny.model, 2, cache)
    at_work = install_cache("transformer", tiny.model, cache, *placed(tiny.model))

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad(), tiny.model.cache_context("cond"):
            return [x.clone() for x in tree_leaves(tiny.model(**tiny.given, return_dict=False))]

    first = outputs()
    tiny.given["hidden_states"] = tree_map(lambda x: x + 1, tiny.given["hidden_states"])
    assert all(a.equal(b) for a, b in zip(outputs(), first, strict=True))
    at_work.remove()
    assert not any(a.equal(b) for a, b in zip(outputs()[:1], first[:1], strict=True))


def test_taylorseer_is_exact_for_what_changes_evenly():
    """An output that is a polynomial of the step, of the order that is kept."""
    transformer = make_transformer()
    with torch.no_grad():
        transformer.proj_out.weight.zero_()
    extrapolating = Cache("taylorseer", 3, {"max_order": 1, "disable_cache_before_step": 2})
    cache = install_cache("transformer", transformer, extrapolating, *placed(transformer))
    given = {"hidden_states": torch.randn(1, 4, 2, 4, 4), "encoder_hidden_states": torch.randn(1, 3, 16)}
    made = []
    with torch.no_grad(), transformer.cache_context("cond"):
        for step in range(6):
            transformer.proj_out.bias.fill_(1.0 + 0.5 * step)
            made.append(transformer(**given, timestep=torch.tensor([500.0])).sample.mean().item())
    assert made == pytest.approx([1.0 + 0.5 * step for step in range(6)])
    cache.remove()


@pytest.mark.parametrize(("name", "missing"), [("cosmos_3", "blocks that could be skipped"), ("easyanimate", "")])
def test_models_that_taylorseer_does_not_know(name, missing):
    with pytest.raises(PresetError, match=missing or "diffusers has no caches for a EasyAnimate"):
        check_cache("transformer", build(name).model, 2, Cache("taylorseer"))


def test_short_runs_do_not_keep_half_of_themselves_dense(pipe):
    with vidaccel.apply(pipe, preset(None, first_steps=0.3)) as handle:
        generate(pipe, 4)
        account = handle.report()
    assert [step.attention for step in account.steps] == ["dense", "sparse", "sparse", "sparse"]
    assert any("keep 1 of them dense instead of 2" in note for note in account.notes)


def test_the_report_as_text_and_as_data(pipe):
    with vidaccel.apply(pipe, preset(EAGER["first_block"], first_steps=2, last_steps=1)) as handle:
        assert "no step yet" in str(handle.report())
        generate(pipe, 5)
        account = handle.report()
        text = str(account)
        assert "5 steps: 10 forwards, 6 computed and 4 skipped; attention 0 sparse, 0 mixed, 3 dense" in text
        assert "no step was sparse" in text and "first steps (6)" in text
        told = json.loads(json.dumps(account.to_dict(), allow_nan=False))
        assert told["version"] == 1 and told["attention"] == json.loads(json.dumps(account.attention.to_dict()))
        assert told["steps"][2]["skipped"] == 2 and told["steps"][2]["density"] is None
        handle.reset()
        assert not handle.report().steps


@pytest.mark.parametrize(
    ("name", "schedule", "told"),
    [
        (None, {"first_steps": 4}, "because of: first steps (24 calls)"),
        ("first_block", {"first_layers": 1.0}, "first layers (12 calls); the cache skipped the other steps"),
        ("first_block", {"first_steps": 2}, "the schedule kept some dense, and the cache skipped all others"),
    ],
)
def test_why_no_step_was_sparse(pipe, name, schedule, told):
    with vidaccel.apply(pipe, preset(name and EAGER[name], **schedule)) as handle:
        generate(pipe, 4)
        (note,) = (note for note in handle.report().notes if "no step was sparse" in note)
    assert note.endswith(told)


def test_the_ratios_that_magcache_needs_are_measured(pipe):
    plain = generate(pipe, 5)
    ratios = measure_mag_ratios(pipe, lambda: generate(pipe, 5))
    assert len(ratios) == 5 and ratios[0] == 1.0 and all(0 < ratio < 10 for ratio in ratios) and len(set(ratios)) > 2
    assert not pipe.transformer.is_cache_enabled and torch.equal(generate(pipe, 5), plain)
    # As diffusers itself tells them.
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=5))
    hook = pipe.transformer.blocks[0]._diffusers_hook.get_hook("mag_cache_leader_block_hook")
    told = []
    pipe.transformer.register_forward_hook(
        lambda *_: told.append(list(hook.state_manager.get_state().calibration_ratios))
    )
    generate(pipe, 5)
    assert told[6] == pytest.approx(ratios[:4], abs=1e-5)  # of the fourth step, before the last one forgets them


def test_ratios_are_measured_of_one_run_with_nothing_left_out(pipe):
    """Others would be stretched over the steps of a run all the same."""
    measured = measure_mag_ratios(pipe, lambda: generate(pipe, 4))
    with pytest.raises(PresetError, match="2 runs were made, and the ratios are those of the steps of one"):
        measure_mag_ratios(pipe, lambda: (generate(pipe, 4), generate(pipe, 4)))
    with (
        vidaccel.guidance_cache(pipe, 2),
        pytest.raises(PresetError, match=r"the transformer has a guidance cache, .* Call remove\(\) on its handle"),
    ):
        measure_mag_ratios(pipe, lambda: generate(pipe, 4))
    for cache in (EAGER["forecast"], EAGER["first_block"]):
        with (
            vidaccel.apply(pipe, Preset(cache=cache)),
            pytest.raises(PresetError, match=f"the transformer has the cache {cache.name} of the preset"),
        ):
            measure_mag_ratios(pipe, lambda: generate(pipe, 4))
    assert not pipe.transformer.is_cache_enabled and not pipe.transformer._forward_pre_hooks
    assert measure_mag_ratios(pipe, lambda: generate(pipe, 4)) == measured
    two = make_pipe(transformer_2=make_transformer(1), boundary_ratio=0.9)
    assert len(measure_mag_ratios(two, lambda: generate(two, 6))) == 6
