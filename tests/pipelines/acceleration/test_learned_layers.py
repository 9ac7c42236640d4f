"""What a model learned for VSA and SLA, where its weights are offloaded or in few bits."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from learned_models import write_models
from offloading import WAYS
from vsa_models import same, velocity

import vidaccel
from vidaccel.pipelines.acceleration.sla_weights import PROJECTION
from vidaccel.pipelines.acceleration.vsa_gates import GATE

LEARNED = {"vsa": GATE, "sla": PROJECTION}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Method -> the folder of a transformer that was trained for it."""
    made = write_models(tmp_path_factory.mktemp("models"))
    return {name: made[name] / "transformer" for name in LEARNED}


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offloaded_first", [True, False])
def test_offloading_before_and_after(folders, method, way, offloaded_first, tmp_path):
    plain = WanTransformer3DModel.from_pretrained(folders[method])
    dense = velocity(plain)
    with vidaccel.accelerate(plain, method):
        wanted = velocity(plain)
    assert (wanted - dense).abs().max() > 1e-3
    transformer = WanTransformer3DModel.from_pretrained(folders[method])
    if offloaded_first:
        WAYS[way](transformer, tmp_path)
    handle = vidaccel.accelerate(transformer, method)
    if not offloaded_first:
        WAYS[way](transformer, tmp_path)
    for _ in range(2):
        same(velocity(transformer), wanted)
    handle.remove()
    assert not hasattr(transformer.blocks[1].attn1, LEARNED[method])
    same(velocity(transformer), dense)


class _FourBits(torch.nn.Linear):
    """Keeps its weight as `Linear4bit` of bitsandbytes does: two numbers a byte, in one column."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        levels = (layer.weight.detach() / (scale := layer.weight.abs().max() / 7) + 8).round().to(torch.uint8).flatten()
        self.scale, self.bias = scale.detach(), layer.bias
        packed = (levels[::2] * 16 + levels[1::2]).unsqueeze(1)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        levels = torch.cat([self.weight // 16, self.weight % 16], 1).view(self.out_features, self.in_features)
        weight = (levels.to(input) - 8) * self.scale.to(input)
        return torch.nn.functional.linear(input, weight, self.bias.to(input))


@pytest.mark.parametrize("method", LEARNED)
def test_a_transformer_in_4_bits(folders, method):
    transformer = WanTransformer3DModel.from_pretrained(folders[method], dtype=torch.bfloat16)
    for block in transformer.blocks:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn1, name, _FourBits(getattr(block.attn1, name)))
    dense = velocity(transformer)
    with vidaccel.accelerate(transformer, method):
        assert (velocity(transformer) - dense).abs().max() > 1e-3
        if method == "vsa":
            assert transformer.blocks[0].attn1.get_submodule(GATE).weight.dtype == torch.bfloat16


def test_gates_beside_weights_in_8_bits_have_the_dtype_that_these_compute_in(folders):
    transformer = WanTransformer3DModel.from_pretrained(folders["vsa"], dtype=torch.bfloat16)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    with vidaccel.accelerate(transformer, "vsa"):
        assert transformer.blocks[0].attn1.get_submodule(GATE).weight.dtype == torch.bfloat16
        assert velocity(transformer).isfinite().all()
