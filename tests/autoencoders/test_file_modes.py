"""Weights are for whom other files are for, by the umask, which safetensors passes over."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidaccel.autoencoders.checkpoint_file import write_stated
from vidaccel.autoencoders.file_modes import as_new_files
from vidaccel.lora.backbones.folders import write_model
from vidaccel.lora.checkpoints.checkpoint import Checkpoint, CheckpointFolder
from vidaccel.lora.checkpoints.written import save_tensors
from vidaccel.pipelines.files.drafts import beside

pytestmark = pytest.mark.skipif(os.name == "nt", reason="files have no such modes there")


@pytest.fixture(params=[0o022, 0o027, 0o077])
def wanted(request) -> Iterator[int]:
    """The mode of new files, under several umasks."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}


def test_everything_that_is_written_is_as_any_new_file(tmp_path, wanted):
    weights = {"w": torch.ones(2)}
    save_tensors(weights, tmp_path / "a.safetensors")
    write_stated(weights, {}, tmp_path / "b.safetensors", ".safetensors")
    CheckpointFolder(tmp_path / "run").save(Checkpoint("train", 1, 1, 0.0, weights=weights), "a: 1\n")
    write_model(_Model(), tmp_path / "model")
    with beside(tmp_path / "converted") as draft:  # as every converter writes
        (draft / "transformer").mkdir()
        save_file(weights, draft / "transformer" / "converted.safetensors")
    found = modes(tmp_path)
    weights_of = {"a", "b", "weights", "model", "converted"}
    assert {f"{name}.safetensors" for name in weights_of} | {"config.yaml"} <= set(found)
    assert set(found.values()) == {wanted}


class _Model:
    """Saved as diffusers saves: below the folder, by safetensors."""

    def save_pretrained(self, folder: Path, safe_serialization: bool) -> None:
        (folder / "transformer").mkdir()
        save_file({"w": torch.ones(2)}, folder / "transformer" / "model.safetensors")


def test_what_a_link_leads_to_stays_as_it_is(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "own.safetensors").touch(0o600)
    (tmp_path / "folder" / "link.safetensors").symlink_to(tmp_path / "own.safetensors")
    as_new_files(tmp_path / "folder")
    assert stat.S_IMODE((tmp_path / "own.safetensors").stat().st_mode) == 0o600
