"""Gates for VSA in files, without a model: where they are found, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from fastwan_models import LAYERS, WIDTH, write_fastwan
from safetensors.torch import load_file, save_file

from vidaccel.pipelines.acceleration.vsa_files import find_gates
from vidaccel.pipelines.acceleration.vsa_gates import TrainedVSA, VSAError, write_config
from vidaccel.pipelines.few_steps import convert_fastwan

PUBLISHED = TrainedVSA(density=0.2, cube=(4, 4, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_fastwan(tmp_path_factory.mktemp("published") / "FastWan", shards=3)


@pytest.fixture(scope="module")
def gates(folder):
    found = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        found |= {name: value for name, value in load_file(file).items() if "to_gate_compress" in name}
    return found


def same(found, gates) -> bool:
    read = found.tensors()
    return sorted(read) == list(range(LAYERS)) and all(
        read[layer][kind].equal(gates[f"blocks.{layer}.to_gate_compress.{kind}"])
        for layer in read
        for kind in ("weight", "bias")
    )


def test_of_a_pipeline_and_of_a_transformer(folder, gates):
    for place in (folder, folder / "transformer", str(folder)):
        found = find_gates(place)
        assert found.trained == PUBLISHED and not found.stated and same(found, gates)
        found.check_fits(LAYERS, WIDTH)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.{}.to_gate_compress.{}",
        "blocks.{}.attn1.to_gate_compress.{}",
        "blocks.{}.self_attn.to_gate_compress.{}",
        "model.diffusion_model.blocks.{}.to_gate_compress.{}",
    ],
)
def test_of_one_file_whatever_stands_round_the_names(gates, tmp_path, name):
    made = {name.format(*(key.split(".")[part] for part in (1, 3))): value for key, value in gates.items()}
    save_file({**made, "head.head.bias": torch.zeros(3)}, tmp_path / "one.safetensors")
    found = find_gates(tmp_path / "one.safetensors")
    assert found.trained == PUBLISHED and not found.stated and same(found, gates)


def test_what_files_state(folder, gates, tmp_path):
    file = convert_fastwan(folder, tmp_path / "fastwan.safetensors", density=0.3)
    found = find_gates(file)
    assert found.stated and found.trained == TrainedVSA(density=0.3, cube=(4, 4, 4)) and same(found, gates)
    other = write_fastwan(tmp_path / "other")
    write_config(other / "transformer", TrainedVSA(density=0.4, cube=(2, 4, 4)))
    assert find_gates(other).trained == TrainedVSA(density=0.4, cube=(2, 4, 4))
    # What a folder states goes on into the file.
    assert find_gates(convert_fastwan(other, tmp_path / "again.safetensors")).trained == find_gates(other).trained
    save_file(gates, tmp_path / "odd.safetensors", {"vidaccel": json.dumps({"vsa": {"density": 7, "cube": [4, 4, 4]}})})
    with pytest.raises(VSAError, match=r"odd.safetensors does not say what its VSA was trained for: VSA density is 7"):
        find_gates(tmp_path / "odd.safetensors")


def test_the_density_of_a_large_model_that_states_none(gates, tmp_path):
    made = {
        f"blocks.0.to_gate_compress.{kind}": torch.zeros(size) for kind, size in (("weight", (5120, 1)), ("bias", 5120))
    }
    save_file(made, tmp_path / "large.safetensors")
    assert find_gates(tmp_path / "large.safetensors").trained.density == 0.1


def test_places_without_gates(folder, gates, tmp_path):
    with pytest.raises(VSAError, match="nowhere is neither a file nor a folder here"):
        find_gates(tmp_path / "nowhere")
    with pytest.raises(VSAError, match=r"holds no transformer in diffusers' layout \(transformer/\*.safetensors\)"):
        find_gates(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(VSAError, match=r"model.gguf ends in .gguf: gates are read from .safetensors alone"):
        find_gates(tmp_path / "model.gguf")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(VSAError, match=r"half.safetensors cannot be read as safetensors \("):
        find_gates(tmp_path / "half.safetensors")
    plain = write_fastwan(tmp_path / "plain", gated=False)
    with pytest.raises(
        VSAError, match=r"plain has no gates \(to_gate_compress\): its model was not trained for VSA, or"
    ):
        find_gates(plain)
    twice = {**gates, **{f"vsa.{name}": value.clone() for name, value in gates.items()}}
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(VSAError, match="has two gates for block 0: "):
        find_gates(tmp_path / "twice.safetensors")


@pytest.mark.parametrize(
    ("layers", "width", "words"),
    [
        (
            3,
            WIDTH,
            "has gates for 2 layers of 256 channels, and this model has 3 of 256: give the files that its weights",
        ),
        (LAYERS, 384, "has gates for 2 layers of 256 channels, and this model has 2 of 384"),
    ],
)
def test_another_model(folder, layers, width, words):
    with pytest.raises(VSAError, match=words):
        find_gates(folder).check_fits(layers, width)


@pytest.mark.parametrize(("shape", "words"), [(None, "is missing"), ((WIDTH, 8), r"is \[256, 8\]")])
def test_gates_that_are_not_whole(gates, tmp_path, shape, words):
    made = dict(gates)
    del made["blocks.0.to_gate_compress.weight"]
    if shape:
        made["blocks.0.to_gate_compress.weight"] = torch.zeros(shape)
    save_file(made, tmp_path / "some.safetensors")
    with pytest.raises(
        VSAError, match=rf"the gate of block 0 \(to_gate_compress.weight\) {words}, and it must be \[256, 256\]"
    ):
        find_gates(tmp_path / "some.safetensors").check_fits(LAYERS, WIDTH)
