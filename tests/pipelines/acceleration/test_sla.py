"""SLA in real Wan pipelines at tiny sizes: what was learned is found, attached, refused and taken away again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from sla_models import METHOD, demo_parts, learned, modules_of, write_adapter, write_model
from torch import nn

import vidaccel
from vidaccel import SLA, DenseSchedule, SparseAttention, VideoLayout
from vidaccel.attention import StepInfo
from vidaccel.pipelines.acceleration.sla_weights import (
    CONFIG,
    SLAError,
    TrainedSLA,
    read_config,
    read_projections,
    write_config,
)

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 64,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
GRID = (2, 4, 6)  # tokens: 48


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("base") / "base"
    WanPipeline(**demo_parts(), transformer=WanTransformer3DModel(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("two") / "two"
    models = {name: WanTransformer3DModel(**TINY) for name in ("transformer", "transformer_2")}
    WanPipeline(**demo_parts(), **models, boundary_ratio=0.9).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, base):
    return write_model(tmp_path_factory.mktemp("model") / "model", base, tokens=[48])


def given(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (1, 8, *(n * p for n, p in zip(GRID, (1, 2, 2), strict=True))), "text": (1, 5, 64)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        "timestep": torch.full((1,), 500.0),
        "hidden_states": made["hidden_states"],
        "encoder_hidden_states": made["text"],
    }


@torch.no_grad()
def velocity(transformer) -> torch.Tensor:
    return transformer(**given()).sample


def state(transformer) -> dict:
    return {name: value.clone() for name, value in transformer.state_dict().items()}


def test_it_is_the_choice_for_a_model_that_was_trained_for_it(model, base):
    with vidaccel.accelerate(WanPipeline.from_pretrained(model)) as handle:
        assert handle.method == SLA(topk=0.3, block=(8, 8), eps=1e-5)
        assert handle.report().notes == ("no method was given: sla, which the model was trained for",)
    with vidaccel.accelerate(WanPipeline.from_pretrained(base)) as handle:
        assert handle.method.name == "tangent"


def test_each_layer_has_its_own_projection(model, monkeypatch):
    """The output of each self-attention is that of an engine with the projection in the file."""
    pipe = WanPipeline.from_pretrained(model)
    seen, call = {}, SparseAttention.__call__

    def spy(self, q, k, v, layer, **options):
        out = call(self, q, k, v, layer, **options)
        seen[layer] = ((q, k, v), options["weights"], out)
        return out

    monkeypatch.setattr(SparseAttention, "__call__", spy)
    with vidaccel.accelerate(pipe, "sla") as handle:
        assert handle.method == SLA(topk=0.3, block=(8, 8), eps=1e-5)
        velocity(pipe.transformer)
        tensors = learned(pipe.transformer)
    monkeypatch.undo()
    assert sorted(seen) == [0, 1]
    for layer, (qkv, weights, out) in seen.items():
        assert torch.equal(weights.weight, tensors[f"blocks.{layer}.attn1.proj_l.weight"])
        engine = SparseAttention(METHOD, num_layers=2)
        engine.enter(StepInfo(), VideoLayout(*GRID))
        projection = nn.Linear(12, 12)
        projection.load_state_dict({k: tensors[f"blocks.{layer}.attn1.proj_l.{k}"] for k in ("weight", "bias")})
        torch.testing.assert_close(out, engine(*qkv, layer, weights=projection))


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_it_goes_without_a_trace(model, base, tmp_path, kind):
    adapter = write_adapter(tmp_path, base) if kind == "adapter" else ()
    pipe = WanPipeline.from_pretrained(model if kind == "model" else base)
    before, plain = state(pipe.transformer), velocity(pipe.transformer)
    handle = vidaccel.accelerate(pipe, "sla", adapter=adapter)
    sparse = velocity(pipe.transformer)
    assert (sparse - plain).abs().max() > 1e-4
    none = SLA(topk=0.3, block=(8, 8), linear_scope="none")
    other = WanPipeline.from_pretrained(base)
    with vidaccel.accelerate(other, none):
        assert (sparse - velocity(other.transformer)).abs().max() > 1e-5  # the projections do something
    handle.remove()
    handle.remove()
    after = state(pipe.transformer)
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(velocity(pipe.transformer), plain)
    assert not getattr(pipe.transformer, "peft_config", None)
    with vidaccel.accelerate(pipe, "sla", adapter=adapter):  # and comes again
        assert torch.equal(velocity(pipe.transformer), sparse)


def test_a_transformer_alone_beside_other_loras_and_in_a_copy(model, base, tmp_path):
    alone = WanTransformer3DModel.from_pretrained(model, subfolder="transformer")
    pipe = WanPipeline.from_pretrained(model)
    with vidaccel.accelerate(alone, "sla"), vidaccel.accelerate(pipe, "sla"):
        wanted = velocity(alone)
        assert torch.equal(velocity(pipe.transformer), wanted)
        copied = copy.deepcopy(pipe)
    (tmp_path / "other").symlink_to(model / "transformer")
    elsewhere = WanTransformer3DModel.from_pretrained(tmp_path / "other")
    with vidaccel.accelerate(elsewhere, "sla"):
        assert torch.equal(velocity(elsewhere), wanted)
    torch.testing.assert_close(velocity(copied.transformer), wanted, rtol=1e-5, atol=1e-6)
    vidaccel.restore(copied)
    torch.testing.assert_close(velocity(copied.transformer), velocity(alone), rtol=1e-5, atol=1e-6)
    with pytest.raises(SLAError, match="cannot load the LoRA .* give the pipeline"):
        vidaccel.accelerate(
            WanTransformer3DModel.from_pretrained(base, subfolder="transformer"),
            "sla",
            adapter=write_adapter(tmp_path, base),
        )


def style(base, tmp_path) -> dict:
    """Another LoRA, for the same layers."""
    folder = tmp_path / "style"
    folder.mkdir()
    return {n: v for n, v in load_file(write_adapter(folder, base, "transformer", rank_seed=9)).items() if "lora" in n}


def test_the_lora_counts_whatever_other_loras_come_and_go(base, tmp_path):
    adapter, other = write_adapter(tmp_path, base), style(base, tmp_path)
    pipe = WanPipeline.from_pretrained(base)
    pipe.load_lora_weights(dict(other), adapter_name="style")
    with vidaccel.accelerate(pipe, "sla", adapter=adapter):
        both = velocity(pipe.transformer)
    pipe.unload_lora_weights()
    with vidaccel.accelerate(pipe, "sla", adapter=adapter):
        alone = velocity(pipe.transformer)
        pipe.load_lora_weights(dict(other), adapter_name="style")
        torch.testing.assert_close(velocity(pipe.transformer), both)
        copied = copy.deepcopy(pipe)
        pipe.set_adapters(["style"], [0.0])
        torch.testing.assert_close(velocity(pipe.transformer), alone)
        copied.set_adapters("style")
        torch.testing.assert_close(velocity(copied.transformer), both)
        pipe.disable_lora()
        with pytest.raises(SLAError, match=r"are disabled, transformer.safetensors among them.*enable_lora\(\)"):
            velocity(pipe.transformer)
        pipe.enable_lora()
        pipe.fuse_lora(adapter_names=["style"])
        with pytest.raises(SLAError, match=r"are fused into the transformer, which leaves .* out: call unfuse_lora"):
            velocity(pipe.transformer)
        pipe.unfuse_lora()
        pipe.delete_adapters("style")
        torch.testing.assert_close(velocity(pipe.transformer), alone)
        pipe.unload_lora_weights()
        with pytest.raises(SLAError, match=r"transformer.safetensors was unloaded from .*by delete_adapters, not by"):
            velocity(pipe.transformer)
    assert not getattr(pipe.transformer, "peft_config", None)


def test_the_lora_is_taken_out_of_weights_that_it_was_fused_into(base, tmp_path):
    pipe = WanPipeline.from_pretrained(base)
    plain = velocity(pipe.transformer)
    with vidaccel.accelerate(pipe, "sla", adapter=write_adapter(tmp_path, base)):
        made = velocity(pipe.transformer)
        pipe.fuse_lora()
        torch.testing.assert_close(velocity(pipe.transformer), made, rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="it has transformer.safetensors as a LoRA; call remove"):
            pipe.transformer.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(velocity(pipe.transformer), plain, rtol=1e-4, atol=1e-5)


def test_two_transformers(two_stages, tmp_path):
    folder = write_model(tmp_path / "one", two_stages)
    with pytest.raises(SLAError, match="transformer_2 was not trained for SLA"):
        vidaccel.accelerate(WanPipeline.from_pretrained(folder), "sla")
    write_model(folder, two_stages, "transformer_2")
    pipe = WanPipeline.from_pretrained(folder)
    with vidaccel.accelerate(pipe, "sla"):
        assert all(hasattr(block.attn1, "proj_l") for block in (*pipe.transformer.blocks, *pipe.transformer_2.blocks))
    write_model(folder, two_stages, "transformer_2", SLA(topk=0.5, block=(8, 8)))
    with pytest.raises(SLAError, match="trained with different settings of SLA"):
        vidaccel.accelerate(WanPipeline.from_pretrained(folder), "sla")
    files = [write_adapter(tmp_path, two_stages, part) for part in ("transformer", "transformer_2")]
    pipe = WanPipeline.from_pretrained(two_stages)
    with vidaccel.accelerate(pipe, "sla", adapter=files):
        assert pipe.transformer_2.peft_config
    with pytest.raises(SLAError, match="and the adapters are transformer.safetensors for transformer: give one for"):
        vidaccel.accelerate(pipe, "sla", adapter=files[0])
    assert not any(hasattr(block.attn1, "proj_l") for block in pipe.transformer.blocks)


@pytest.mark.parametrize(
    ("method", "schedule", "words"),
    [
        (SLA(), None, r"block is \(64, 64\), trained with \(8, 8\)\."),
        (
            SLA(topk=0.6, block=(8, 8)),
            None,
            "topk 0.6 reads 3 of 6 key blocks at 48 tokens, trained with 1 ",
        ),
        (SLA(topk=0.3, block=(8, 8), feature_map="elu"), None, "feature_map is elu, trained with softmax"),
        (SLA(topk=0.3, block=(8, 8), linear_scope="none"), None, "linear_scope is none, trained with all"),
        (SLA(topk=0.3, block=(8, 8), eps=0.1), None, "eps is 0.1, trained with 1e-05"),
        (METHOD, DenseSchedule(first_layers=1), r"schedule is .*first_layers=1.*, trained with"),
    ],
)
def test_other_settings_than_those_of_the_training(model, method, schedule, words):
    pipe = WanPipeline.from_pretrained(model)
    with pytest.raises(SLAError, match=f"{words}.*Use those of the training"):
        vidaccel.accelerate(pipe, method, schedule=schedule)
    assert not hasattr(pipe.transformer.blocks[0].attn1, "proj_l")
    with vidaccel.accelerate(pipe, SLA(topk=0.32, block=(8, 8))):  # as many blocks
        pass


def test_what_is_missing(base, model, tmp_path):
    pipe = WanPipeline.from_pretrained(base)
    for method in ("sla", SLA()):
        with pytest.raises(SLAError, match=r"was not trained for SLA.*folder that says so.*needs no training"):
            vidaccel.accelerate(pipe, method)
    with vidaccel.accelerate(pipe, SLA(block=(8, 8), linear_scope="none")):
        pass
    with pytest.raises(ValueError, match='adapter is for the method "sla", not for radial'):
        vidaccel.accelerate(pipe, "radial", adapter=tmp_path)
    # A config that came without its weights, as when the transformer was saved after remove().
    bare = tmp_path / "bare"
    pipe.save_pretrained(bare)
    write_config(bare / "transformer", read_config(str(model)))
    with pytest.raises(SLAError, match="lacks 4 tensors of SLA, such as blocks.0.attn1.proj_l.bias"):
        vidaccel.accelerate(WanPipeline.from_pretrained(bare), "sla")


def test_adapters_that_do_not_fit(base, tmp_path):
    pipe = WanPipeline.from_pretrained(base)
    plain = velocity(pipe.transformer)
    for changes, words in (
        ({"base_hash": "0123"}, "was trained on base .transformer., and this transformer has other weights"),
        ({"recipe": "gft"}, "an adapter of the recipe gft: give one that the recipe sla made"),
        ({"left_out": "blocks.1.attn1.proj_l.bias"}, "lacks 1 tensors of SLA, such as blocks.1.attn1.proj_l.bias"),
        ({"sla": {"topk": 0.3}}, "does not say what its SLA was trained for"),
    ):
        with pytest.raises(SLAError, match=words):
            vidaccel.accelerate(pipe, "sla", adapter=write_adapter(tmp_path, base, **changes))
    assert torch.equal(velocity(pipe.transformer), plain)


def test_other_lengths_are_told(model, base, tmp_path):
    pipe = WanPipeline.from_pretrained(model)
    with vidaccel.accelerate(pipe, "sla") as handle:
        velocity(pipe.transformer)
        assert not any("trained on videos" in note for note in handle.report().notes)
    pipe = WanPipeline.from_pretrained(write_model(tmp_path / "other", base, tokens=[96]))
    with vidaccel.accelerate(pipe, "sla") as handle:
        velocity(pipe.transformer)
        assert "SLA was trained on videos of 96 tokens, and this one has 48" in handle.report().notes


def test_the_config_says_all_and_comes_back(model, tmp_path):
    trained = TrainedSLA.of(SLA(topk=0.2, linear_scope="marginal", skip=0.3), [576, 1088], "a/b", "12")
    (tmp_path / "transformer").mkdir()
    write_config(tmp_path / "transformer", trained)
    assert read_config(str(tmp_path)) == trained
    config = tmp_path / "transformer/config.json"
    stated = json.loads(config.read_text())["_trained_for"]["sla"]
    assert stated["blocks"] == {"576": 1, "1088": 3} and stated["routing"] == "centred_keys"
    assert trained.method() == SLA(topk=0.2, linear_scope="marginal", skip=0.3, eps=0.0)
    config.write_text("{}")
    for changes, words in (
        ({"routing": "hashes"}, "blocks chosen by hashes"),
        ({"topk": 0}, "does not say what its SLA was trained for: SLA topk is 0"),
        ({"blocks": None}, "does not say what its SLA was trained for"),
    ):
        (tmp_path / "transformer" / CONFIG).write_text(json.dumps({**stated, **changes}))
        with pytest.raises(SLAError, match=words):
            read_config(str(tmp_path))
    layers = list(modules_of(WanTransformer3DModel.from_pretrained(model, subfolder="transformer")))
    assert len(read_projections(str(model), layers)) == 4


@pytest.mark.compiler
def test_a_compiled_model_has_the_projections_too(model):
    pipe = WanPipeline.from_pretrained(model)
    with vidaccel.accelerate(pipe, "sla"):
        wanted = velocity(pipe.transformer)
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        torch.testing.assert_close(velocity(pipe.transformer), wanted, rtol=1e-4, atol=1e-5)
