"""The LoRAs of a preset beside others that come and go, in real Wan pipelines at tiny sizes."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import logging
import weakref

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import WanTransformer3DModel
from gft_calls import loaded
from safetensors.torch import load_file, save_file
from tiny_wan import aligned, generate, make_pipe, make_transformer

import vidaccel
from vidaccel import Preset
from vidaccel.pipelines.loras.kept_loras import tuner_layers
from vidaccel.pipelines.presets import LoraFile, PresetError, SchedulerChoice, loras


@pytest.fixture
def pipe():
    return make_pipe()


def test_a_lora_beside_another_leaves_its_weight(pipe, lora):
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="mine")
    pipe.set_adapters(["mine"], [0.3])
    plain = generate(pipe)
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora, 2.0),))):
        both = generate(pipe)
    assert pipe.get_active_adapters() == ["mine"] and torch.equal(generate(pipe), plain)
    pipe.set_adapters(["mine"], [2.3])
    assert torch.allclose(generate(pipe), both, atol=1e-4)


@pytest.fixture
def two():
    return make_pipe(transformer_2=make_transformer(1), boundary_ratio=0.9)


def holders(pipe) -> list[str]:
    """The transformers with a LoRA."""
    return [name for name in ("transformer", "transformer_2") if getattr(getattr(pipe, name), "peft_config", None)]


def test_a_lora_goes_where_its_header_says(two, lora, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(load_file(lora), file, {"vidaccel": json.dumps({"part": "transformer_2", "levels": [0.0, 0.9]})})
    (tmp_path / "a.yaml").write_text("version: 1\nloras: [a.safetensors]\n")
    for preset in (tmp_path / "a.yaml", Preset(loras=str(file)), Preset(loras=LoraFile(file, target="transformer_2"))):
        with vidaccel.apply(two, preset) as handle:
            assert holders(two) == ["transformer_2"] and handle.report().notes == ()
    for target in ("transformer", "all"):
        with pytest.raises(PresetError, match=f"for {target}, and its header says that it was trained for transformer"):
            vidaccel.apply(two, Preset(loras=LoraFile(file, target=target)))


def test_a_lora_is_looked_at_once(two, lora, monkeypatch):
    """Each look opens its file."""
    looks = []
    own = loras.check_readable
    monkeypatch.setattr(loras, "check_readable", lambda path: looks.append(path) or own(path))
    with vidaccel.apply(two, Preset(loras=LoraFile(lora))) as handle:
        assert looks == [lora] and len(handle.report().notes) == 1


def test_a_lora_that_does_not_say_where_it_goes(two, lora, tmp_path):
    with vidaccel.apply(two, Preset(loras=LoraFile(lora))) as handle:
        assert holders(two) == ["transformer", "transformer_2"]
        assert "a.safetensors goes into both transformers" in handle.report().notes[0]
    high = tmp_path / "high_noise.safetensors"
    save_file(load_file(lora), high)
    with pytest.raises(PresetError, match="is by its name for one of .* in a preset target: transformer"):
        vidaccel.apply(two, Preset(loras=LoraFile(high)))
    with vidaccel.apply(two, Preset(loras=LoraFile(high, target="transformer"))) as handle:
        assert holders(two) == ["transformer"] and handle.report().notes == ()


def matrices(lora, times: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: times * matrix for name, matrix in load_file(lora).items()}


def test_it_counts_whatever_other_loras_come_and_go(pipe, lora):
    plain = generate(pipe)
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        alone = generate(pipe)
        pipe.load_lora_weights(matrices(lora, 0.5), adapter_name="style")
        both = generate(pipe)
        assert not torch.allclose(both, alone)
        pipe.set_adapters(["style"], [0.0])
        assert torch.allclose(generate(pipe), alone)
        copied = copy.deepcopy(pipe)
        copied.set_adapters(["style"], [1.0])
        assert torch.allclose(generate(copied), both)
        pipe.disable_lora()
        with pytest.raises(PresetError, match=r"are disabled, a.safetensors among them.*enable_lora\(\)"):
            generate(pipe)
        pipe.enable_lora()
        pipe.fuse_lora(adapter_names=["style"])
        with pytest.raises(PresetError, match=r"are fused into the transformer, which leaves a.safetensors out: call"):
            generate(pipe)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        with pytest.raises(PresetError, match=r"a.safetensors was unloaded from the transformer") as raised:
            generate(pipe)
        assert raised.value.lever == "loras"
    assert torch.allclose(generate(pipe), plain, atol=1e-5)
    vidaccel.restore(copied)
    assert copied.get_active_adapters() == ["style"]


def test_it_is_refused_where_it_would_not_count(pipe, lora):
    preset = Preset(loras=(LoraFile(lora),))
    pipe.load_lora_weights(matrices(lora, 0.5), adapter_name="style")
    pipe.disable_lora()
    before = generate(pipe)
    with pytest.raises(PresetError, match=r"the LoRAs of the transformer are disabled.*enable_lora\(\)"):
        vidaccel.apply(pipe, preset)
    assert torch.equal(generate(pipe), before)
    pipe.enable_lora()
    assert pipe.get_active_adapters() == ["style"]
    assert list(pipe.transformer.peft_config) == ["style"] and not pipe.transformer._forward_pre_hooks


def test_those_that_were_loaded_or_weighed_meanwhile_stay(pipe, lora):
    pipe.load_lora_weights(matrices(lora, 0.5), adapter_name="before")
    learns = {name: parameter.requires_grad for name, parameter in pipe.transformer.named_parameters()}
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        pipe.load_lora_weights(matrices(lora, 2.0), adapter_name="since")
        pipe.set_adapters(["before", "since"], [0.2, 0.3])
        assert pipe.get_active_adapters() == ["before", "since"]
    assert pipe.get_active_adapters() == ["before", "since"]
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert layer.scaling == {"before": 0.2, "since": 0.3}
    pipe.delete_adapters("since")
    assert {name: parameter.requires_grad for name, parameter in pipe.transformer.named_parameters()} == learns


def test_none_is_made_active_that_was_not(pipe, lora):
    pipe.load_lora_weights(matrices(lora), adapter_name="mine")
    for layer in tuner_layers(pipe.transformer).values():
        layer.set_adapter([])
    plain = generate(pipe)
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        assert not torch.allclose(generate(pipe), plain)
    assert torch.equal(generate(pipe), plain)


@pytest.mark.parametrize("beside", [False, True])
def test_it_is_taken_out_of_the_weights_that_it_was_fused_into(pipe, lora, beside, caplog):
    if beside:
        pipe.load_lora_weights(matrices(lora, 0.5), adapter_name="mine")
    plain = generate(pipe)
    with caplog.at_level(logging.WARNING), vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        made = generate(pipe)
        pipe.fuse_lora()
        assert torch.allclose(generate(pipe), made, atol=1e-5)
    assert torch.allclose(generate(pipe), plain, atol=1e-5)
    assert "a.safetensors was fused into the transformer" in caplog.text and "rounding" in caplog.text
    if beside:
        assert pipe.transformer.blocks[0].attn1.to_q.merged_adapters == ["mine"]
        pipe.unfuse_lora()
        assert torch.allclose(generate(pipe), plain, atol=1e-5)


def test_fused_and_unloaded_it_counts_and_is_taken_out(pipe, lora):
    plain = generate(pipe)
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        made = generate(pipe)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert torch.allclose(generate(pipe), made, atol=1e-5)
    assert torch.allclose(generate(pipe), plain, atol=1e-5)


def test_merged_for_good_it_is_saved(pipe, lora, tmp_path):
    scheduler = SchedulerChoice("FlowMatchEulerDiscreteScheduler", {"shift": 9.0})
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        made = generate(pipe)
        copied = copy.deepcopy(pipe)
        for each in (pipe, copied):
            each.fuse_lora()
            with pytest.raises(RuntimeError, match="gave it loras"):
                each.save_pretrained(tmp_path / "fused")
            each.unload_lora_weights()
            each.transformer.save_pretrained(tmp_path / "part")
            alone = make_pipe(transformer=WanTransformer3DModel.from_pretrained(tmp_path / "part").eval())
            assert torch.allclose(generate(alone), made, atol=1e-5)
        pipe.save_pretrained(tmp_path / "whole")
        assert torch.allclose(generate(loaded(tmp_path / "whole")), made, atol=1e-5)
    with vidaccel.apply(pipe, Preset(name="p", scheduler=scheduler, loras=(LoraFile(lora),))):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        with pytest.raises(RuntimeError, match=r"the preset p gave it scheduler; call remove\(\)"):
            pipe.save_pretrained(tmp_path / "scheduled")


def test_of_a_transformer_copied_alone_it_can_be_unloaded(pipe, lora, tmp_path):
    plain = generate(pipe)
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        made = generate(pipe)
        copied = copy.deepcopy(pipe.transformer)
        with pytest.raises(RuntimeError, match=r"has a.safetensors as a LoRA; call unload_lora\(\)"):
            copied.save_pretrained(tmp_path)
        other = make_pipe(transformer=copied)
        assert torch.allclose(generate(other), made)
        other.disable_lora()
        with pytest.raises(PresetError, match=r"call enable_lora\(\), or unload_lora\(\)"):
            generate(other)
        copied.unload_lora()
        assert torch.equal(generate(other), plain)
        copied.save_pretrained(tmp_path)
        assert torch.equal(
            generate(make_pipe(transformer=aligned(WanTransformer3DModel.from_pretrained(tmp_path)))), plain
        )
        assert torch.equal(generate(pipe), made)


def test_weighed_while_it_is_fused_it_is_taken_out_as_it_was_put_in(pipe, lora):
    pipe.load_lora_weights(matrices(lora, 0.5), adapter_name="mine")
    plain = generate(pipe)
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        pipe.fuse_lora()
        pipe.unfuse_lora()
        pipe.fuse_lora(lora_scale=0.7)
        pipe.set_adapters(["mine", "preset_0"], [1.0, 0.5])
    assert "merge" not in vars(pipe.transformer.blocks[0].attn1.to_q)
    pipe.unfuse_lora()
    assert torch.allclose(generate(pipe), plain, atol=1e-5)


def test_fused_into_weights_that_are_offloaded_it_is_taken_out_after_the_offloading(pipe, lora, caplog):
    plain = generate(pipe)
    handle = vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),), cache="first_block"))
    pipe.fuse_lora()
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu")
    with pytest.raises(
        RuntimeError, match=r"a.safetensors was fused into the transformer, .* the offloading off first"
    ):
        handle.remove()
    assert "out of its weights" not in caplog.text
    with pytest.raises(RuntimeError, match="at work in this pipeline"):
        vidaccel.apply(pipe, Preset(cache="first_block"))
    remove_hook_from_module(pipe.transformer, recurse=True)
    vidaccel.restore(pipe)
    assert torch.allclose(generate(pipe), plain, atol=1e-5) and not pipe.transformer._forward_pre_hooks
    handle.remove()


def test_unloaded_it_is_taken_out_of_weights_that_were_moved_since(pipe, lora, monkeypatch):
    """It is no longer in the transformer, so it did not move with it."""
    handle = vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),)))
    layer = pipe.transformer.blocks[0].attn1.to_q
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.to(torch.bfloat16)
    moved = []
    for matrices in (layer.lora_A, layer.lora_B):
        monkeypatch.setattr(matrices, "to", moved.append)
    handle.remove()
    assert moved == [torch.device("cpu")] * 2
    before = make_pipe().transformer.to(torch.bfloat16).state_dict()
    assert all(
        torch.allclose(weight, before[name], atol=0.02) for name, weight in pipe.transformer.state_dict().items()
    )


def test_one_layer_that_keeps_it_leaves_no_other_with_it(two, lora, monkeypatch, caplog):
    plain = generate(two)
    handle = vidaccel.apply(two, Preset(loras=(LoraFile(lora, target="all"),)))
    two.fuse_lora(components=["transformer", "transformer_2"])
    layer = two.transformer.blocks[0].attn1.to_q

    def fails():
        raise RuntimeError("no memory")

    monkeypatch.setattr(layer, "unmerge", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        handle.remove()
    assert holders(two) == []
    for part in (two.transformer, two.transformer_2):
        assert not part._forward_pre_hooks and "save_pretrained" not in vars(part)
    assert "a.safetensors was fused into the transformer and cannot be taken out of all" in caplog.text
    assert "a.safetensors was fused into the transformer_2, and is out of its weights" in caplog.text
    handle.remove()
    monkeypatch.undo()
    with torch.no_grad():
        two.transformer.blocks[0].attn1.to_q.weight.copy_(make_pipe().transformer.blocks[0].attn1.to_q.weight)
    assert torch.allclose(generate(two), plain, atol=1e-5)


def test_deleted_while_it_is_fused_it_stays_which_is_said(pipe, lora, caplog):
    pipe.load_lora_weights(matrices(lora, 0.5), adapter_name="mine")
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        pipe.fuse_lora(adapter_names=["preset_0"])
        made = generate(pipe)
        pipe.delete_adapters("preset_0")
    assert "a.safetensors was fused into the transformer and cannot be taken out of all its weights" in caplog.text
    pipe.set_adapters(["mine"], [0.0])
    assert torch.allclose(generate(pipe), made, atol=1e-5)


def test_what_is_saved_would_not_load_again(pipe, lora, tmp_path):
    scheduler = SchedulerChoice("FlowMatchEulerDiscreteScheduler", {"shift": 9.0})
    with vidaccel.apply(pipe, Preset(name="p", scheduler=scheduler, loras=(LoraFile(lora),))):
        with pytest.raises(RuntimeError, match=r"the preset p gave it scheduler and loras; call remove\(\)"):
            pipe.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match=r"this WanTransformer3DModel cannot be .* has a.safetensors as a LoRA"):
            pipe.transformer.save_pretrained(tmp_path)
        copied, alone = copy.deepcopy(pipe), copy.deepcopy(pipe.transformer)
    assert not list(tmp_path.iterdir())
    pipe.save_pretrained(tmp_path / "plain")
    assert type(loaded(tmp_path / "plain").scheduler) is type(pipe.scheduler)
    assert torch.equal(generate(loaded(tmp_path / "plain")), generate(pipe))
    with pytest.raises(RuntimeError, match="gave it scheduler and loras"):
        copied.save_pretrained(tmp_path / "copied")
    vidaccel.restore(copied)
    copied.save_pretrained(tmp_path / "copied")
    assert (tmp_path / "copied" / "model_index.json").exists()
    with pytest.raises(RuntimeError, match="has a.safetensors as a LoRA"):
        alone.save_pretrained(tmp_path / "alone")


def test_a_shallow_copy_is_saved_once_all_is_taken_out(pipe, lora, tmp_path):
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        copied = copy.copy(pipe)
        with pytest.raises(RuntimeError, match="gave it loras"):
            copied.save_pretrained(tmp_path)
    copied.save_pretrained(tmp_path)
    assert torch.equal(generate(loaded(tmp_path)), generate(pipe))


def test_what_refuses_has_the_signature_that_diffusers_looks_at(pipe, lora):
    owners = (pipe, pipe.transformer)
    before = [inspect.signature(owner.save_pretrained) for owner in owners]
    with vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),))):
        assert [inspect.signature(owner.save_pretrained) for owner in owners] == before


def test_a_handle_that_is_kept_keeps_no_model(pipe, lora):
    handle = vidaccel.apply(pipe, Preset(loras=(LoraFile(lora),)))
    transformer = weakref.ref(pipe.transformer)
    handle.remove()
    pipe.transformer = None
    gc.collect()
    assert transformer() is None


def test_with_other_levers_it_is_saved(pipe, tmp_path):
    with vidaccel.apply(pipe, Preset(cache="first_block")):
        pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(loaded(tmp_path)), generate(pipe))
