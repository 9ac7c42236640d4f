"""Folders of pipelines that were not downloaded whole."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from vidaccel import demo
from vidaccel.generation.errors import BadInput
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.generation.run import load
from vidaccel.lora.backbones import open_model
from vidaccel.lora.config import ConfigError
from vidaccel.pipelines.files.missing_weights import missing_weights


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(demo.path(), tmp_path / "model")
    return tmp_path / "model"


def in_shards(part, shards, there):
    """The weights of a part as shards, of which some are there."""
    whole = next(part.glob("*.safetensors"))
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    index = {"weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    for name in names[:there]:
        shutil.copy(whole, part / name)
    whole.unlink()


def test_what_is_whole_or_not_known_is_left_to_who_loads_it(folder, tmp_path):
    assert not missing_weights(str(folder)) and not missing_weights("owner/name") and not missing_weights(str(tmp_path))
    in_shards(folder / "transformer", 3, 3)
    assert not missing_weights(str(folder))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert not missing_weights(str(folder))
    (folder / "vae" / "config.json").unlink()
    assert not missing_weights(str(folder))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_part_without_weights_is_told_before_any_are_read(folder, monkeypatch, part):
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr("vidaccel.pipelines.loading.load_pipeline", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(BadInput, match=rf"it is not whole: .*{part} has no weights beside its config.json. Download"):
        load(inspect_model(str(folder)), "float32", "cpu")


def test_shards_that_are_missing_are_named(folder):
    in_shards(folder / "transformer", 4, 1)
    told = missing_weights(str(folder))
    assert "lacks diffusion_pytorch_model-00002-of-00004.safetensors, diffusion_pytorch_model-00003-of-0000" in told
    assert "and 1 more, which diffusion_pytorch_model.safetensors.index.json names" in told


@pytest.mark.parametrize("as_bin", [False, True])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_file_that_is_cut_off_or_another_one_is_named(folder, part, as_bin):
    [file] = (folder / part).glob("*model.safetensors")
    if as_bin:
        weights = load_file(file)
        file.unlink()
        file = folder / part / ("pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin")
        torch.save(weights, file)
        assert not missing_weights(str(folder))
    whole = file.read_bytes()
    for content in (whole[:-100], b"<html>", b""):
        file.write_bytes(content)
        with pytest.raises(BadInput, match=rf"not whole: .*{re.escape(str(file))} is cut off, or no file of weights: "):
            load(inspect_model(str(folder)), "float32", "cpu")
        with pytest.raises(ConfigError, match=rf"model.base: .* is not whole: {re.escape(str(file))} is cut off"):
            open_model(str(folder), "lora")


def test_a_training_is_told_of_other_layouts(folder, tmp_path):
    (folder / "model_index.json").unlink()
    (folder / "config.json").write_text('{"_class_name": "WanModel"}')
    with pytest.raises(ConfigError, match="layout in which Wan is published.*Give .*-Diffusers"):
        open_model(str(folder), "lora")
