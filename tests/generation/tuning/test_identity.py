"""What a journal of `tune` is of."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import WanPipeline
from diffusers.hooks import apply_group_offloading

from vidaccel import demo
from vidaccel.generation.errors import BadInput
from vidaccel.generation.tuning.identity import others_in_files, weights_of_others
from vidaccel.generation.tuning.journal import FILE, VERSION, Journal


def test_what_lies_beside_the_parts_of_a_model_is_no_part(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(demo.path(), folder)
    before = others_in_files(str(folder))
    (folder / "tune").mkdir()
    for name in ("README.txt", "tune/tune.json", "tune/a.safetensors"):
        (folder / name).write_text("a file")
    assert others_in_files(str(folder)) == before
    shutil.copy(folder / "vae" / "config.json", folder / "vae" / "other.json")
    assert others_in_files(str(folder)) != before


def test_weights_on_a_disk_are_no_numbers(tmp_path):
    """Memory that nothing was written to lies in their place."""

    def on_disk(name: str) -> str:
        pipe = WanPipeline.from_pretrained(demo.path())
        apply_group_offloading(
            pipe.text_encoder, torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / name)
        )
        return weights_of_others(pipe)

    assert on_disk("first") == on_disk("second")


def test_a_journal_of_an_earlier_version_is_told_as_that(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"head": {"version": VERSION, "model": "demo"}}) + "\n")
    with pytest.raises(BadInput, match="written by an earlier version, which did not note scheduler and weights. Give"):
        Journal(tmp_path, {"model": "demo", "scheduler": {}, "weights": ""})
