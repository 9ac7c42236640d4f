"""LoRA files that a model cannot take, or not whole: what is said of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from gft_adapters import random_lora
from safetensors.torch import save_file
from tiny_wan import generate, make_pipe, make_transformer

import vidaccel
from vidaccel import Preset
from vidaccel.pipelines.errors import first_line
from vidaccel.pipelines.loras.files import LoraError, LoraFile, attach_loras
from vidaccel.pipelines.loras.layers import LoraLayers

Q = "diffusion_model.blocks.{}.self_attn.q"


@pytest.fixture
def lora() -> dict[str, torch.Tensor]:
    """Of the first attention's queries in the three blocks of the tiny Wan, by its authors' names."""
    return random_lora(make_transformer(), "transformer")[1]


def wider(name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.ones(2 * len(x), x.shape[1]) if "lora_B" in name else torch.ones(len(x), 2 * x.shape[1])


def misfits(lora: dict[str, torch.Tensor]) -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """By a name: matrices, and what is said of them."""
    kohya = {
        f"lora_unet_blocks_{n}_self_attn_q.{end}": x
        for n in range(3)
        for end, x in (
            ("lora_down.weight", lora[f"{Q.format(n)}.lora_A.weight"]),
            ("lora_up.weight", lora[f"{Q.format(n)}.lora_B.weight"]),
            ("alpha", torch.tensor(1.0)),
        )
    }
    width = "is for layers of width 128, and blocks.{}.attn1.to_q of this WanTransformer3DModel has 64"
    renamed = {k.replace("lora_A.weight", "lokr_w1").replace("lora_B.weight", "lokr_w2"): x for k, x in lora.items()}
    scaled = lora | {f"{Q.format(0)}.dora_scale": torch.ones(64, 1)}
    own = own_names(lora)
    down, up = (f"transformer.blocks.0.attn1.to_q.lora_{end}.weight" for end in "AB")
    lost = {end: {k: x for k, x in own.items() if k != end} for end in (down, up)}
    again = "the file is damaged; save or download it again"
    return {
        "another width": ({k: wider(k, x) for k, x in lora.items()}, width.format(0)),
        "partly": ({k: wider(k, x) if "blocks.2" in k else x for k, x in lora.items()}, width.format(2)),
        "queries": (kohya, "lacks blocks_0_self_attn_k.lora_down.weight, without which diffusers reads no file"),
        "lokr": (renamed, "has matrices of LoKr, which diffusers does not load into a WanPipeline: give a LoRA"),
        "no first": (lost[down], f"has {up} without {down}, and a layer needs both: {again}"),
        "no second": (lost[up], f"has {down} without {up}, and a layer needs both: {again}"),
        "flat": (own | {down: torch.ones(64)}, rf"has {down} of the shape \[64\], where a matrix has two dimensions"),
        "no numbers": (own | {up: own[up] * torch.nan}, f"has values in {up} that are NaN or infinite: {again}"),
        "whole numbers": (own | {up: own[up].int()}, f"has {up} in torch.int32, which is no type of weights"),
        "foreign key": (lora | {"foo.bar": torch.zeros(3)}, "has foo.bar, which is no matrix of a LoRA: take it out"),
        "dora": (scaled, "has matrices of DoRA, which diffusers does not load into a WanPipeline: give a LoRA"),
    }


BROKEN = ["no first", "no second", "flat", "no numbers", "whole numbers", "foreign key"]


@pytest.mark.parametrize("name", ["another width", "partly", "queries", "lokr", "dora", *BROKEN])
def test_what_cannot_be_loaded_says_why(name, lora, tmp_path):
    """diffusers' own words are a heading, a key or a list of keys."""
    matrices, words = misfits(lora)[name]
    file = tmp_path / f"{name}.safetensors"
    save_file(matrices, file)
    pipe = make_pipe()
    plain = generate(pipe)
    with pytest.raises(LoraError, match=f"^{file.name} {words}"):
        attach_loras(make_pipe(), [LoraFile(file)])
    with pytest.raises(LoraError, match=words):  # beside one that has its layers already
        save_file(lora, tmp_path / "good.safetensors")
        attach_loras(make_pipe(), [LoraFile(tmp_path / "good.safetensors"), LoraFile(file)])
    with pytest.raises(vidaccel.PresetError, match=f"loras: {file.name} {words}"):
        vidaccel.apply(pipe, Preset(loras=[LoraFile(file)]))
    assert generate(pipe).equal(plain)


@pytest.mark.parametrize("name", BROKEN)
def test_it_is_said_before_weights_are_read(name, lora, tmp_path):
    matrices, words = misfits(lora)[name]
    file = tmp_path / f"{name}.safetensors"
    save_file(matrices, file)
    layers = LoraLayers("WanPipeline", {"_class_name": "WanTransformer3DModel", **make_transformer().config})
    assert re.match(words, layers.misfit(file))


def own_names(matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of diffusers."""
    return {
        k.replace("diffusion_model", "transformer").replace("self_attn.q", "attn1.to_q"): x for k, x in matrices.items()
    }


@pytest.mark.parametrize("folder", [False, True])
def test_layers_that_the_model_lacks_are_told(folder, lora, tmp_path):
    of_first = {k: x for k, x in lora.items() if ".0." in k}
    more = lora | {k.replace(".0.", f".{n}."): x.clone() for n in (7, 8, 9) for k, x in of_first.items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(more, file)
    place = tmp_path if folder else file
    handle = vidaccel.apply(make_pipe(), Preset(loras=[LoraFile(place)]))
    (note,) = handle.report().notes
    assert note == (
        f"{place.name} is not whole here: it is also for layers that the transformer does not have "
        "(blocks.7.attn1.to_q, blocks.8.attn1.to_q and 1 more)"
    )
    save_file(lora, file)
    assert vidaccel.apply(make_pipe(), Preset(loras=[LoraFile(place)])).report().notes == ()


def test_scales_of_dora_that_diffusers_leaves_out_are_told(lora, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(own_names(lora) | {"transformer.blocks.0.attn1.to_q.dora_scale": torch.ones(64, 1)}, file)
    assert attach_loras(make_pipe(), [LoraFile(file)]) == [
        "a.safetensors is not whole here: it is of DoRA, whose scales diffusers leaves out"
    ]


def test_the_bias_of_one_layer_alone(lora, tmp_path):
    """The other layers' had no numbers, and the first pass failed on them."""

    def made(name: str, biases: list[int]) -> torch.Tensor:
        file: Path = tmp_path / f"{name}.safetensors"
        diffs = {n: torch.full((64,), 0.5) if n == 1 else torch.zeros(64) for n in biases}
        save_file(lora | {f"{Q.format(n)}.diff_b": x for n, x in diffs.items()}, file)
        pipe = make_pipe()
        attach_loras(pipe, [LoraFile(file)])
        return generate(pipe)

    some = made("some", [1])
    assert some.equal(made("all", [0, 1, 2])) and not some.equal(made("none", []))


def test_a_heading_is_told_with_what_it_is_of():
    assert first_line(RuntimeError("Error(s) in loading:\n\tsize mismatch for a\n\tfor b")) == (
        "Error(s) in loading: size mismatch for a"
    )
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("nothing comes:")) == "nothing comes:"
