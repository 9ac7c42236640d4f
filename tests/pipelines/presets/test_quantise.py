"""Layers in 8 bits while other things happen to the pipeline, and back, in real Wan pipelines at tiny sizes."""

from __future__ import annotations

import pytest
import torch
from gft_adapters import random_lora
from gft_calls import loaded
from tiny_wan import generate, make_pipe, make_transformer

import vidaccel
from vidaccel import Preset
from vidaccel.pipelines.loras.kept_loras import tuner_layers
from vidaccel.pipelines.presets import Quantize
from vidaccel.pipelines.presets.applied import quantise_for_good

pytest.importorskip("torchao")
INT8 = Preset(quantize=Quantize("int8"))


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture(scope="module")
def lora() -> dict[str, torch.Tensor]:
    return random_lora(make_transformer(), "transformer")[1]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_weights_come_back_in_the_dtype_that_the_pipeline_has_since(pipe, kind):
    expected = make_pipe()
    expected.to(torch.bfloat16)
    with vidaccel.apply(pipe, Preset(quantize=Quantize(kind))):
        pipe.to(torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    assert torch.equal(generate(pipe), generate(expected))


def test_without_biases_too():
    transformer = make_transformer()
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.bias = None
    pipe = make_pipe(transformer=transformer)
    with vidaccel.apply(pipe, INT8):
        pipe.to(torch.bfloat16)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}


def test_layers_of_several_dtypes_keep_them(pipe):
    pipe.transformer.blocks[0].ffn.to(torch.bfloat16)
    before = {name: parameter.dtype for name, parameter in pipe.transformer.named_parameters()}
    vidaccel.apply(pipe, INT8).remove()
    assert {name: parameter.dtype for name, parameter in pipe.transformer.named_parameters()} == before


def test_a_lora_that_was_loaded_meanwhile_is_an_ordinary_one_afterwards(pipe, lora):
    expected = make_pipe()
    expected.load_lora_weights(dict(lora), adapter_name="mine")
    plain = generate(pipe)
    with vidaccel.apply(pipe, INT8):
        pipe.load_lora_weights(dict(lora), adapter_name="mine")
    kinds = {type(layer) for layer in tuner_layers(pipe.transformer).values()}
    assert kinds == {type(layer) for layer in tuner_layers(expected.transformer).values()}
    made = generate(pipe)
    assert torch.equal(made, generate(expected))
    pipe.fuse_lora()
    assert torch.allclose(generate(pipe), made, atol=1e-5)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(generate(pipe), plain, atol=1e-5)


def test_a_layer_is_described_as_before(pipe):
    layer = pipe.transformer.blocks[0].attn1.to_q
    other = pipe.transformer.blocks[0].attn1.to_k
    other.extra_repr = lambda: "of somebody else"
    before = [(set(vars(each)), repr(each)) for each in (layer, other)]
    for _ in range(2):
        vidaccel.apply(pipe, INT8).remove()
        assert [(set(vars(each)), repr(each)) for each in (layer, other)] == before


def test_layers_that_stay_in_8_bits_keep_their_loras(pipe, lora):
    with vidaccel.apply(pipe, Preset(quantize=Quantize("int8", keep=False))):
        pipe.load_lora_weights(dict(lora), adapter_name="mine")
        made = generate(pipe)
    assert torch.equal(generate(pipe), made)


def test_what_is_saved_would_not_load_again(pipe, tmp_path):
    with vidaccel.apply(pipe, INT8):
        for part in (pipe, pipe.transformer):
            with pytest.raises(RuntimeError, match=r"cannot be saved as it is: .*; call remove\(\)"):
                part.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(generate(loaded(tmp_path)), generate(pipe))
    quantise_for_good(pipe, INT8, "cpu")
    with pytest.raises(RuntimeError, match="in 8 bits for good; load the model again without quantize"):
        pipe.save_pretrained(tmp_path)
