"""`apply` in real pipelines at tiny sizes: every lever at work, one handle, and nothing left behind."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
import re
import sys
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
)
from gft_adapters import write_adapter
from gft_calls import loaded, made, saved
from tiny_families import build
from tiny_pipelines import hunyuan, mochi, run
from tiny_wan import generate, make_pipe, make_transformer
from torch._dynamo.testing import CompileCounterWithBackend

import vidaccel
from vidaccel import SVG2, DenseSchedule, Preset
from vidaccel.pipelines import supported_pipelines
from vidaccel.pipelines.presets import Cache, LoraFile, PresetError, Quantize, SchedulerChoice, save_preset
from vidaccel.pipelines.presets.account import Watch
from vidaccel.pipelines.presets.applied import quantise_for_good
from vidaccel.pipelines.presets.tables import GIVEN, UNEVEN

SPARSE = {"method": SVG2(top_p=0.5, schedule=DenseSchedule(first_steps=1)), "backend": "reference"}
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    return write_adapter(tmp_path_factory.mktemp("adapter"), base, make_transformer())


@pytest.fixture
def pipe(base):
    return loaded(base)


def weights(pipe) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


def test_all_levers_at_once_and_nothing_left_behind(pipe, base, adapter, lora, tmp_path):
    preset = Preset(
        name="all",
        family="Wan 2.1 / 2.2",
        transformer={"num_layers": 3, "patch_size": [1, 2, 2]},
        **SPARSE,
        loras=(LoraFile(lora, 0.5),),
        guidance_free=(str(adapter),),
        cache=Cache("first_block", 1e3),
        scheduler=SchedulerChoice("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
        num_inference_steps=4,
        guidance_scale=3.0,
    )
    before, plain, scheduler = weights(pipe), made(pipe), pipe.scheduler
    with vidaccel.apply(pipe, save_preset(preset, tmp_path / "all.yaml")) as handle:
        assert list(preset.levers()) == ["scheduler", "loras", "guidance_free", "method", "cache"]
        assert handle.arguments == {"num_inference_steps": 4, "guidance_scale": 3.0}
        assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler" and pipe.scheduler.shift == 5.0
        assert torch.equal(made(pipe, 3.0, 4), made(pipe, 3.0, 4))
        account = handle.report().last()
        # One pass a step, of which the cache leaves out all but the dense one and the next, to which it compares.
        assert [s.forwards for s in account.steps] == [1] * 4 and account.counts()["skipped"] >= 2
        assert account.steps[0].attention == "dense"
    assert pipe.scheduler is scheduler and not hasattr(pipe, "_vidaccel_preset")
    after = weights(pipe)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(made(pipe), plain)
    assert not pipe.transformer._forward_pre_hooks and not pipe.transformer.is_cache_enabled


def test_without_a_method_the_account_is_there_too(pipe):
    with vidaccel.apply(pipe, Preset(cache=Cache("first_block", 1e3))) as handle:
        generate(pipe, 4)
    steps = handle.report().steps
    assert [(s.forwards, s.skipped, s.attention) for s in steps] == [(2, 0, "stock"), *[(2, 2, "-")] * 3]


@needs_torchao
@pytest.mark.parametrize("keep", [True, False])
def test_linear_layers_in_8_bits_and_back(pipe, adapter, keep):
    plain = made(pipe)
    preset = Preset(quantize=Quantize("int8", keep=keep), guidance_free=(str(adapter),), **SPARSE)
    handle = vidaccel.apply(pipe, preset)
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert type(layer.weight.data) is not torch.Tensor
    assert type(pipe.transformer.proj_out.weight.data) is torch.Tensor
    assert handle.report().notes == () or not keep
    assert torch.isfinite(made(pipe)).all()
    with pytest.raises(PresetError, match="quantised already"):
        vidaccel.apply(make_quantised(pipe, handle), Preset(quantize=Quantize("int8")))
    handle.remove()
    assert torch.equal(made(pipe), plain) is keep
    assert any("weights as they were are gone" in note for note in handle.report().notes) is not keep


@needs_torchao
def test_layers_in_8_bits_for_good(pipe):
    """Whoever applies the same finds them at work; another way is refused, and remove() leaves them."""
    preset = Preset(quantize=Quantize("int8"), **SPARSE)
    with vidaccel.apply(pipe, preset):
        expected = made(pipe)
    quantise_for_good(pipe, preset, "cpu")
    with vidaccel.apply(pipe, preset) as handle:
        assert torch.equal(made(pipe), expected)
        assert "quantize" in handle.report().levers
    assert type(pipe.transformer.blocks[0].attn1.to_q.weight.data) is not torch.Tensor
    with pytest.raises(PresetError, match="quantised already"):
        vidaccel.apply(pipe, preset.replace(quantize=Quantize("int8", activations=True)))


def test_a_device_gets_layers_that_are_in_8_bits_already(pipe, monkeypatch):
    """Each layer is moved and quantised by torchao in turn; all else follows."""
    moved = []

    def quantize_(transformer, config, filter_fn, device):
        moved.append((device, {p.device.type for part in pipe.components.values() for p in parameters(part)}))

    def parameters(part):
        return part.parameters() if isinstance(part, torch.nn.Module) else ()

    stub = SimpleNamespace(quantize_=quantize_, Int8WeightOnlyConfig=object)
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(quantization=stub))
    monkeypatch.setattr("vidaccel.pipelines.presets.checks.check_packages", lambda preset: None)
    quantise_for_good(pipe, Preset(quantize=Quantize("int8")), "meta")
    assert moved == [("meta", {"cpu"})]
    assert {p.device.type for part in pipe.components.values() for p in parameters(part)} == {"meta"}


def make_quantised(pipe, handle):
    """The same transformer in another pipeline, in which no preset is at work."""
    return make_pipe(transformer=pipe.transformer)


def test_a_scheduler_that_was_set_meanwhile_stays(pipe):
    handle = vidaccel.apply(pipe, Preset(scheduler=SchedulerChoice("FlowMatchEulerDiscreteScheduler", {"shift": 9.0})))
    mine = pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    handle.remove()
    assert pipe.scheduler is mine
    copied = copy.deepcopy(pipe)
    handle = vidaccel.apply(copied, Preset(scheduler=SchedulerChoice("UniPCMultistepScheduler")))
    other = copy.deepcopy(copied)
    vidaccel.restore(other)
    assert type(copied.scheduler).__name__ == "UniPCMultistepScheduler"
    handle.remove()
    assert other.scheduler.shift == copied.scheduler.shift == 7.0


def test_another_scheduler_keeps_the_noise_levels_of_the_model(pipe):
    """Those of flow matching have two names for one number, and others must be told that it is flow matching."""
    euler, unipc = SchedulerChoice("FlowMatchEulerDiscreteScheduler"), SchedulerChoice("UniPCMultistepScheduler")
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    with vidaccel.apply(pipe, Preset(scheduler=euler)):
        assert pipe.scheduler.shift == 5.0
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    with vidaccel.apply(pipe, Preset(scheduler=unipc)):
        config = pipe.scheduler.config
        assert config.flow_shift == 7.0 and config.use_flow_sigmas and config.prediction_type == "flow_prediction"
        pipe.scheduler.set_timesteps(5)
        assert pipe.scheduler.sigmas.max() <= 1
    with pytest.raises(PresetError, match="the model is of flow matching, and DDIMScheduler is not made for that"):
        vidaccel.apply(pipe, Preset(scheduler=SchedulerChoice("DDIMScheduler")))


def test_a_scheduler_in_the_place_of_one_of_this_package(pipe):
    """Both are of flow matching, though their configs do not say so; neither has a shift."""
    unipc, euler = SchedulerChoice("UniPCMultistepScheduler"), SchedulerChoice("FlowMatchEulerDiscreteScheduler")
    pipe.scheduler = vidaccel.GridScheduler([1.0, 0.5])
    with vidaccel.apply(pipe, Preset(scheduler=SchedulerChoice(unipc.name, {"flow_shift": 5.0}))):
        config = pipe.scheduler.config
        assert config.flow_shift == 5.0 and config.use_flow_sigmas and config.prediction_type == "flow_prediction"
    for choice, name in ((unipc, "flow_shift"), (euler, "shift")):
        with pytest.raises(PresetError, match=f"no shift, which {choice.name} needs. Give {name} in its settings"):
            vidaccel.apply(pipe, Preset(scheduler=choice))
    with pytest.raises(PresetError, match="of flow matching, and DDIMScheduler is not made for that"):
        vidaccel.apply(pipe, Preset(scheduler=SchedulerChoice("DDIMScheduler")))
    with vidaccel.apply(pipe, Preset(scheduler=SchedulerChoice("GridScheduler"))):
        assert pipe.scheduler.levels == (1.0, 0.5)
    pipe.scheduler = vidaccel.RCMScheduler(sigma_max=200.0)
    for choice in (unipc, euler):
        with pytest.raises(PresetError, match="distilled for the times and noise of the RCMScheduler"):
            vidaccel.apply(pipe, Preset(scheduler=choice))
    with vidaccel.apply(pipe, Preset(scheduler=SchedulerChoice("RCMScheduler", {"ode": True}))):
        assert pipe.scheduler.config.ode and pipe.scheduler.config.sigma_max == 200.0


def test_refused_before_anything_is_touched(pipe, tmp_path, lora, adapter):
    before = weights(pipe)
    for fields, lever, message in (
        ({"family": "Mochi 1"}, "family", "is for Mochi 1, and the transformer of this pipeline is of Wan 2.1 / 2.2"),
        ({"family": "Mochy"}, "family", "there is none of that name"),
        ({"transformer": {"num_layers": 30, "in_channels": 4}}, "transformer", "num_layers 30 there, 3 here"),
        ({"scheduler": SchedulerChoice("Unipc")}, "scheduler", "diffusers has no scheduler of that name"),
        (
            {"scheduler": SchedulerChoice("UniPCMultistepScheduler", {"shft": 1})},
            "scheduler",
            "UniPCMultistepScheduler has no setting shft",
        ),
        ({"loras": (LoraFile(tmp_path / "none"),)}, "loras", "there is no such file or folder"),
        ({"loras": (LoraFile(adapter),)}, "loras", "a guidance-free adapter. Give it as guidance_free"),
        ({"loras": (LoraFile(lora, target="transformer_2"),)}, "loras", "this pipeline has transformer alone"),
        ({"guidance_free": (str(lora),)}, "guidance_free", "not written by this package's trainer"),
        ({"guidance_free": ("own",)}, "guidance_free", "has no guidance-free adapter of its own"),
        ({"guidance_free": (str(adapter),), "guidance_scale": 50.0}, "guidance_free", "50"),
        ({"quantize": Quantize("fp8", activations=True)}, "quantize", ""),
        ({"scheduler": SchedulerChoice("DDIMScheduler")}, "scheduler", "DDIMScheduler is not made for that"),
        ({"method": vidaccel.SLA()}, "attention", "trained"),
    ):
        with pytest.raises(PresetError) as raised:
            vidaccel.apply(pipe, Preset(**fields))
        assert raised.value.lever == lever and message in str(raised.value), fields
        assert not pipe.transformer._forward_pre_hooks and type(pipe).__name__ == "WanPipeline"
        assert all(torch.equal(tensor, pipe.transformer.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "settings", "steps"),
    [
        ("GridScheduler", {"sigmas": [1.0, 0.9, 0.7, 0.4]}, 4),
        ("RCMScheduler", {}, 4),
        ("DMDScheduler", {}, 3),
        ("UniPCMultistepScheduler", {}, 4),
    ],
)
def test_a_scheduler_in_a_pipeline_that_gives_noise_levels_in_each_call(name, settings, steps):
    """HunyuanVideo gives evenly spaced ones; a scheduler with levels of its own takes their number."""
    pipe, options = hunyuan()
    with vidaccel.apply(pipe, Preset(scheduler=SchedulerChoice(name, settings), num_inference_steps=steps)) as handle:
        run(pipe, options, steps=steps)
        assert [step.num_steps for step in handle.report().steps] == [steps] * steps
        if "sigmas" in settings:
            assert pipe.scheduler.sigmas.tolist() == pytest.approx([*settings["sigmas"], 0.0])
            with pytest.raises(ValueError, match="sigmas is given, but the noise levels are those of the training"):
                run(pipe, options, steps=steps, sigmas=[1.0, 0.5, 0.2, 0.1])


@pytest.mark.parametrize(
    ("make", "name", "problem"),
    [
        (hunyuan, "FlowMatchHeunDiscreteScheduler", "a HunyuanVideoPipeline gives its scheduler sigmas in each call"),
        (mochi, "GridScheduler", "a MochiPipeline has steps of its own, and those of a GridScheduler are fixed"),
        (mochi, "RCMScheduler", "a MochiPipeline has steps of its own, and those of a RCMScheduler are fixed"),
    ],
)
def test_a_scheduler_that_does_not_take_what_the_pipeline_gives_is_refused_before_a_run(make, name, problem):
    pipe, _ = make()
    own = pipe.scheduler
    with pytest.raises(PresetError, match=problem) as raised:
        vidaccel.apply(pipe, Preset(scheduler=SchedulerChoice(name)))
    assert raised.value.lever == "scheduler" and pipe.scheduler is own


def test_what_pipelines_give_their_scheduler_is_as_diffusers_has_it():
    levels = re.compile(r"\bsigmas = .*(linspace|linear_quadratic_schedule)\(")
    found = set()
    for name in supported_pipelines():
        cls = getattr(diffusers, name, None)  # two are this package's own, and one needs a library that is missing here
        if "diffusers.pipelines" in getattr(cls, "__module__", "") and levels.search(inspect.getsource(cls)):
            found.add(name)
    # Cosmos 3 only where its config says so; LTX-2 DFR in another method.
    assert found - {"Cosmos3OmniPipeline"} == GIVEN.keys() - {"LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline"}
    assert GIVEN.keys() >= UNEVEN


def test_compiled_blocks_stay_whole_graphs():
    """With a preset at work, compiled before and after it: no graph breaks, nor a graph for each layer."""
    pipe = make_pipe(transformer=make_transformer(num_layers=6))
    with vidaccel.apply(pipe, Preset(**SPARSE)) as handle:
        expected, account = generate(pipe), handle.report()
    for first in ("compiled", "preset"):
        torch._dynamo.reset()
        pipe = make_pipe(transformer=make_transformer(num_layers=6))
        counter = CompileCounterWithBackend("eager")
        if first == "compiled":
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        with vidaccel.apply(pipe, Preset(**SPARSE)) as handle:
            if first == "preset":
                pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
            torch.testing.assert_close(generate(pipe), expected)
            assert handle.report().steps == account.steps
        assert 1 <= counter.frame_count <= 2


def test_steps_by_their_noise_are_refused_where_the_scheduler_does_not_tell_it(pipe):
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(PresetError, match="noise levels") as raised:
        vidaccel.apply(pipe, Preset(method=SVG2(schedule=DenseSchedule(sigma_above=0.9))))
    assert raised.value.lever == "attention"


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_8_bits_are_refused_where_the_weights_are_offloaded_in_groups(pipe, kind, monkeypatch):
    monkeypatch.setattr("vidaccel.pipelines.presets.checks.check_packages", lambda preset: None)  # no torchao is needed
    cpu, blocks = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    with pytest.raises(PresetError, match=r"the transformer is offloaded in groups .*Offload whole parts") as raised:
        vidaccel.apply(pipe, Preset(quantize=Quantize("int8")))
    assert raised.value.lever == "quantize"
    assert type(pipe.transformer.blocks[0].attn1.to_q.weight.data) is torch.Tensor
    with vidaccel.apply(pipe, Preset(**SPARSE)):  # all else can be had
        generate(pipe)


def test_a_library_that_is_missing(pipe, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in ("torchao", "cache_dit") else find(name, *more)
    )
    with pytest.raises(PresetError, match="Install it: pip install torchao"):
        vidaccel.apply(pipe, Preset(quantize=Quantize("int8")))
    with pytest.raises(PresetError, match="Install it: pip install cache-dit"):
        vidaccel.apply(pipe, Preset(cache=Cache("cache_dit")))


def test_once_alone_and_restored_where_the_handle_is_lost(pipe):
    plain = generate(pipe)
    vidaccel.apply(pipe, Preset(name="one", cache=Cache("first_block", 1e3), **SPARSE))
    with pytest.raises(RuntimeError, match="the preset one is at work"):
        vidaccel.apply(pipe, Preset())
    vidaccel.restore(pipe)
    assert torch.equal(generate(pipe), plain)
    vidaccel.accelerate(pipe, "svg2")
    with pytest.raises(PresetError, match="accelerated already"):
        vidaccel.apply(pipe, Preset(**SPARSE))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("hunyuan_video_15", "does not know the HunyuanVideo15TransformerBlock"),
        ("easyanimate", "diffusers has no caches for a EasyAnimateTransformer3DModel"),
    ],
)
def test_a_family_that_a_cache_does_not_know(family, message):
    tiny = build(family)
    pipe = make_pipe()
    pipe.transformer = tiny.model
    with pytest.raises(PresetError, match=message):
        vidaccel.apply(pipe, Preset(cache=Cache("first_block")))
    with pytest.raises(PresetError, match="SeaCache|no caches|does not know"):
        vidaccel.apply(pipe, Preset(cache=Cache("seacache")))


BROADCAST = PyramidAttentionBroadcastConfig(cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500)


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(), BROADCAST], ids=lambda config: type(config).__name__)
def test_a_cache_that_was_enabled_by_hand(pipe, config):
    pipe.transformer.enable_cache(config)
    there = f"the transformer has {type(config).__name__} already"
    with pytest.raises(PresetError, match=f"{there}, which skips .*give the preset a cache instead") as raised:
        vidaccel.apply(pipe, Preset(**SPARSE))
    assert raised.value.lever == "method" and not pipe.transformer._forward_pre_hooks
    for name in ("first_block", "taylorseer", "cache_dit"):
        if name == "cache_dit" and importlib.util.find_spec("cache_dit") is None:
            continue
        with pytest.raises(PresetError, match=rf"{there}.*Call transformer.disable_cache\(\) first"):
            vidaccel.apply(pipe, Preset(cache=Cache(name, settings={"Fn_compute_blocks": 1} if "dit" in name else {})))
    vidaccel.apply(pipe, Preset(num_inference_steps=4)).remove()  # nothing that it gets in the way of
    vidaccel.apply(pipe, Preset(method=SVG2(schedule=DenseSchedule()))).remove()
    assert pipe.transformer.is_cache_enabled


GRID = SchedulerChoice("GridScheduler", {"sigmas": [1.0, 0.9, 0.7, 0.4]})


@pytest.mark.parametrize(
    ("choice", "steps", "message"),
    [
        (GRID, 8, "num_inference_steps is 8: the GridScheduler has 4 noise levels"),
        (SchedulerChoice("RCMScheduler"), 5, "num_inference_steps is 5: the RCMScheduler has times for 1 to 4"),
        (SchedulerChoice("DMDScheduler"), 4, "num_inference_steps is 4: the DMDScheduler has times for 1 to 3"),
    ],
)
def test_steps_that_a_scheduler_does_not_have(pipe, choice, steps, message):
    with pytest.raises(PresetError, match=message):
        vidaccel.apply(pipe, Preset(scheduler=choice, num_inference_steps=steps))


def test_settings_of_the_same_name_are_not_taken_over():
    """UniPC, as every Wan has it, has a sigma_max, which is null in the files of a saved pipeline."""
    pipe = make_pipe(scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, sigma_max=None))
    with vidaccel.apply(pipe, Preset(scheduler=SchedulerChoice("RCMScheduler"))):
        assert pipe.scheduler.config.sigma_max == 80.0 and pipe.scheduler.config.num_train_timesteps == 1000
        generate(pipe, 4)


def test_a_run_with_other_steps_is_told(pipe):
    with vidaccel.apply(pipe, Preset(num_inference_steps=4, **SPARSE)) as handle:
        generate(pipe, 6)
    (note,) = [note for note in handle.report().notes if "num_inference_steps" in note]
    assert "for 4 steps (num_inference_steps), and a run has 6" in note


def test_a_copy_of_the_transformer_leaves_the_pipeline_alone_and_cannot_be_pickled():
    pipe = make_pipe()
    plain = generate(pipe)
    with vidaccel.apply(pipe, Preset(**SPARSE)) as handle:
        fast = generate(pipe)
        alone = copy.deepcopy(pipe.transformer)
        (watch,) = [hook.__self__ for hook in alone._forward_pre_hooks.values() if isinstance(hook.__self__, Watch)]
        assert watch is not handle._watches[0] and watch._pipe is None
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(pipe.transformer)
        both = copy.deepcopy(pipe)
        assert torch.equal(generate(both), fast)
        assert len(handle.report().steps) == 4
    assert both._vidaccel_preset is not handle
    both._vidaccel_preset.remove()
    assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(both), plain)
