"""A base as a single file: trained as the folder that has the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_runs import recipe, write
from safetensors.torch import load_file, save_file

from vidaccel import demo
from vidaccel.lora.config import ConfigError
from vidaccel.lora.places import absent
from vidaccel.pipelines.few_steps.wan_names import renamed
from vidaccel.pipelines.files.weight_files import transformer_files, weights_of


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VIDACCEL_CACHE", str(tmp_path / "cache"))
    [own] = weights_of(str(demo.path()))
    path = tmp_path / "wan_tiny.safetensors"
    save_file({renamed(name, "original"): value for name, value in load_file(own).items()}, path)
    return path


def test_it_is_named_by_its_file(file, tmp_path):
    made = recipe(write(tmp_path / "a", file, model={"components": "demo"}))
    assert Path(made.backbone.base).parent == tmp_path / "cache" / "converted"
    assert made.base_hash == transformer_files(made.backbone.base)
    assert (made.facts()["base"], made.facts()["base_hash"]) == (file.name, made.base_hash)


def test_what_is_missing_or_of_no_use_is_told(file, tmp_path):
    for base, model, words in (
        (
            file,
            {},
            "components is missing: .* is a transformer alone. Give the folder or hub id of a",
        ),
        ("demo", {"components": "demo"}, "components is of use only with a single file as base, and that is demo"),
        (tmp_path / "gone.safetensors", {"components": "demo"}, "model.base: there is no file .*gone"),
        (file, {"components": "demo", "stage": "low_noise"}, "has no model_index.json and transformer_2/config.json"),
    ):
        with pytest.raises(ConfigError, match=words):
            recipe(write(tmp_path / "a", base, model=model))
    gone = {"model": {"base": "gone.safetensors", "components": "no folder"}}
    told = list(absent(gone))
    assert told[0] == "model.base: there is no file gone.safetensors: correct the path."
    assert told[1].startswith("model.components: no folder is no folder here, no hub id") and len(told) == 2
