"""Safetensors files written as one, under other names."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidaccel.pipelines.files.renamed_weights import write_renamed

TENSORS = {
    "a.weight": torch.arange(15).view(3, 5).to(torch.bfloat16),
    "a.bias": torch.randn(3),
    "b.scale": torch.tensor(2.5, dtype=torch.float64),
    "b.codes": torch.arange(7, dtype=torch.uint8),
    "c.empty": torch.zeros(0, 4),
}


@pytest.fixture
def files(tmp_path):
    """Two, as a model in shards."""
    names = list(TENSORS)
    made = []
    for number in range(2):
        made.append(tmp_path / f"part-{number}.safetensors")
        save_file({name: TENSORS[name] for name in names[number::2]}, made[-1], {"format": "pt"})
    return made


def test_every_bit_is_kept_under_another_name(files, tmp_path):
    target = tmp_path / "new" / "whole.safetensors"
    assert write_renamed(files, target, lambda name: f"x.{name}", {"format": "pt", "from": "here"}) == target
    found = load_file(target)
    assert set(found) == {f"x.{name}" for name in TENSORS}
    for name, tensor in TENSORS.items():
        assert found[f"x.{name}"].dtype == tensor.dtype and found[f"x.{name}"].equal(tensor)
    with safe_open(target, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "from": "here"}
    raw = target.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__")
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in header.items():  # each number at a multiple of its size, as readers map it into memory
        assert (start + entry["data_offsets"][0]) % TENSORS[name.removeprefix("x.")].element_size() == 0
    assert list(target.parent.iterdir()) == [target]


def test_two_of_one_name(files, tmp_path):
    with pytest.raises(ValueError, match="two tensors of .* would be called same"):
        write_renamed(files, tmp_path / "whole.safetensors", lambda name: "same", {})
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_a_file_that_ends_too_early_leaves_nothing(files, tmp_path):
    raw = files[0].read_bytes()
    files[0].write_bytes(raw[:-1])
    with pytest.raises(OSError, match=r"part-0.safetensors ends too early: it was not written as a whole"):
        write_renamed(files, tmp_path / "whole.safetensors", str, {})
    assert sorted(tmp_path.iterdir()) == sorted(files)
