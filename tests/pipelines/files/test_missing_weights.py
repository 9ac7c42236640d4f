"""Folders of pipelines that were not downloaded whole."""

from __future__ import annotations

import json
import shutil

import pytest

from vidaccel import demo
from vidaccel.generation.errors import BadInput
from vidaccel.generation.models.inspected import inspect_model
from vidaccel.generation.run import load
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
