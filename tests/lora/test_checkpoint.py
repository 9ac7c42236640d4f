"""Checkpoints: what is written comes back, and a failed write leaves the last good one."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource

import numpy as np
import pytest
import torch

from vidaccel.lora.checkpoints import checkpoint as module
from vidaccel.lora.checkpoints import written
from vidaccel.lora.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    random_state,
    set_random_state,
)
from vidaccel.lora.checkpoints.written import replaced, save_tensors, save_text


def make(step: int = 1, size: int = 8) -> Checkpoint:
    weights = {"w": torch.full((size,), float(step))}
    optimizer = {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return Checkpoint(
        "first", step, step, 1.5, {"t": torch.ones(2)}, weights, {}, {"optimizer": optimizer}, [random_state()]
    )


def test_round_trip(tmp_path):
    folder = CheckpointFolder(tmp_path)
    made = make()
    back = folder.load(folder.save(made, "a: 1\n"))
    assert (back.phase, back.step, back.seconds) == ("first", 1, 1.5)
    assert torch.equal(back.weights["w"], made.weights["w"]) and torch.equal(back.trained["t"], torch.ones(2))
    assert back.state["optimizer"]["param_groups"] == made.state["optimizer"]["param_groups"]
    assert (folder.find("latest") / "config.yaml").read_text() == "a: 1\n"


def test_random_states_come_back():
    torch.rand(3), np.random.rand(3), random.random(), random.gauss(0, 1)
    state = random_state()
    first = (torch.rand(3), np.random.rand(3), random.random(), np.random.randn())
    set_random_state(state)
    second = (torch.rand(3), np.random.rand(3), random.random(), np.random.randn())
    assert torch.equal(first[0], second[0]) and (first[1] == second[1]).all() and first[2:] == second[2:]


def test_the_last_ones_stay(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        folder.save(make(step), "")
    assert [path.name for path in folder.saved()] == ["step_00000002", "step_00000003"]


def test_latest_is_the_last_that_was_written(tmp_path):
    """After a resume from an earlier checkpoint, what was written later in the abandoned run is older."""
    folder = CheckpointFolder(tmp_path, keep_last=3)
    for step in (10, 20, 15):
        folder.save(make(step), "")
    assert folder.find("latest").name == "step_00000015"


def test_a_copy_is_in_the_same_order(tmp_path):
    """By the times of files a copy went on from a wrong checkpoint, and pruned the best."""
    folder = CheckpointFolder(tmp_path, keep_last=3)
    for number, step in enumerate((10, 20, 15)):
        path = folder.save(make(step), "") / "checkpoint.json"
        os.utime(path, ns=((9 - number) * 10**9, (9 - number) * 10**9))
    folder.validated()
    assert [path.name[-2:] for path in folder.saved()] == ["10", "20", "15"]
    assert folder.load(folder.find("latest")).step == 15
    # Those that were written before there was an order go by their steps, and come first.
    for path in folder.saved()[:2]:
        facts = json.loads((path / "checkpoint.json").read_text())
        del facts["order"]
        (path / "checkpoint.json").write_text(json.dumps(facts))
        os.utime(path / "checkpoint.json", ns=(10**9 - int(path.name[-2:]), 10**9))
    assert [path.name[-2:] for path in folder.saved()] == ["10", "20", "15"]
    folder.keep_last = 2
    folder.save(make(12), "")
    assert [path.name[-2:] for path in folder.saved()] == ["15", "12"]


def test_adapters_can_stay(tmp_path):
    """Of checkpoints that do not; what was one is none any more."""

    def adapter(folder, weights):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "a.safetensors").write_bytes(b"small")

    folder = CheckpointFolder(tmp_path, keep_last=1, keep_adapters=True)
    for step in (1, 2, 3):
        folder.save(make(step), "", adapter if step != 1 else None)
    assert [path.name for path in folder.saved()] == ["step_00000003"]
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/**/*"))
    left = [path for path in left if not path.startswith("step_00000003")]
    assert left == ["step_00000002/adapter", "step_00000002/adapter/a.safetensors"]


def test_the_same_step_is_replaced(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(make(5), "old")
    again = make(5)
    again.weights["w"] += 1
    path = folder.save(again, "new")
    assert torch.equal(folder.load(path).weights["w"], again.weights["w"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch, failing):
    """Whichever of the files is the one that no longer fits."""
    folder = CheckpointFolder(tmp_path)
    good = folder.save(make(1), "")
    calls = 0

    def flush(file):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    for place in (written, module):
        monkeypatch.setattr(place, "flush", flush)
    with pytest.raises(
        CheckpointError, match=r"No space left.*MiB are free there. The last good one is .*step_00000001"
    ):
        folder.save(make(2), "")
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert folder.load(folder.find("latest")).step == 1


def test_a_write_that_really_fails(tmp_path):
    """The system refuses files above 4 kB."""
    folder = CheckpointFolder(tmp_path)
    folder.save(make(1), "")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            folder.save(make(2, size=100_000), "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder.load(folder.find("latest")).step == 1


def test_what_an_interrupted_write_left_is_cleaned(tmp_path):
    folder = CheckpointFolder(tmp_path)
    path = folder.save(make(1), "")
    (tmp_path / ".step_00000002.part").mkdir()
    path.rename(tmp_path / ".step_00000001.old.part")  # killed between the two renames
    folder.clean()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "checkpoint.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    folder = CheckpointFolder(tmp_path)
    path = folder.save(make(), "")
    (path / name).write_bytes((path / name).read_bytes()[:20])
    with pytest.raises(CheckpointError, match="is damaged"):
        folder.load(path)


@pytest.mark.parametrize("name", ["trained.safetensors", "weights.safetensors", "state.pt"])
def test_damage_that_leaves_the_length_is_noticed(tmp_path, name):
    folder = CheckpointFolder(tmp_path)
    path = folder.save(make(size=1000), "")
    whole = bytearray((path / name).read_bytes())
    # Of the archive, a number of the optimiser: its first storage, behind the pickle.
    place = whole.index(np.float32(2.0).tobytes(), whole.index(b"data/0")) if name == "state.pt" else len(whole) - 3
    whole[place] ^= 1
    (path / name).write_bytes(whole)
    with pytest.raises(CheckpointError, match=rf"is damaged \({name} does not hold what was written\): resume from an"):
        folder.load(path)


def changed_facts(path, **values):
    file = path / "checkpoint.json"
    facts = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in facts.items() if value is not ...}))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"foo": 1}, "checkpoint.json has foo"),
        ({"step": ...}, "checkpoint.json lacks step"),
        ({"step": "1"}, "step in checkpoint.json is '1'"),
        ({"total_steps": True}, "total_steps in checkpoint.json is True"),
        ({"phase": [1]}, r"phase in checkpoint.json is \[1\]"),
        ({"step": -5}, "step in checkpoint.json is -5, and total_steps 1"),
        ({"step": 2}, "step in checkpoint.json is 2, and total_steps 1"),
        ({"checksums": {}}, "checkpoint.json has checksums of no file"),
        ({"checksums": {"../a.yaml": "00000000"}}, "checkpoint.json has checksums of ../a.yaml"),
    ],
)
def test_facts_that_cannot_be_are_named(tmp_path, values, told):
    folder = CheckpointFolder(tmp_path)
    path = folder.save(make(), "")
    changed_facts(path, **values)
    with pytest.raises(CheckpointError, match=rf"step_00000001 is damaged \({told}\): resume from an earlier one"):
        folder.load(path)


class Harmful:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1], "state.pt holds something other than a state"),
        ({"state": {}, "random": []}, "state.pt holds something other than a state"),
        ({"state": Harmful(), "random": []}, r"state.pt holds something other than weights \(\w+.system\)"),
    ],
)
def test_a_state_that_is_none(tmp_path, content, told):
    """The sum is right, as in a file that somebody gives away."""
    folder = CheckpointFolder(tmp_path)
    path = folder.save(make(), "")
    torch.save(content, path / "state.pt")
    sums = json.loads((path / "checkpoint.json").read_text())["checksums"]
    changed_facts(path, checksums=sums | {"state.pt": module._checksum(path / "state.pt")})
    with pytest.raises(CheckpointError, match="is damaged") as refused:
        folder.load(path)
    assert re.search(rf"{told}\): resume from an earlier one\.$", str(refused.value))


@pytest.mark.parametrize("content", [b'{"order": 3, "ste', b"[]", b"[" * 100_000, b"\xff\xfe", b'{"order": "x"}'])
def test_the_latest_is_not_an_earlier_one_where_it_is_damaged(tmp_path, content):
    folder = CheckpointFolder(tmp_path, keep_last=2)
    paths = [folder.save(make(step), "") for step in (1, 2)]
    (paths[1] / "checkpoint.json").write_bytes(content)
    told = rf"{paths[1]} is damaged \(checkpoint.json cannot be read\), .*: resume from .* --resume {paths[0]}\.$"
    with pytest.raises(CheckpointError, match=told):
        folder.find("latest")
    assert folder.find(paths[0]) == paths[0]
    with pytest.raises(CheckpointError, match="is damaged"):
        folder.load(paths[1])
    # It counts for nothing, and stays.
    more = [folder.save(make(step), "") for step in (3, 4)]
    assert folder.saved() == more and folder.damaged() == [paths[1]] and paths[1].is_dir()
    assert folder.how_to_resume() == f"continue with --resume {more[-1]}"


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        CheckpointFolder(tmp_path).find("latest")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        CheckpointFolder(tmp_path).find(tmp_path / "step_1")


def test_tensors_are_written_whole(tmp_path, monkeypatch):
    path = save_tensors({"a": torch.ones(2)}, tmp_path / "x" / "a.safetensors")
    before = path.read_bytes()

    def fail(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(written, "flush", fail)
    with pytest.raises(OSError, match="No space"):
        save_tensors({"a": torch.zeros(2)}, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_text_and_folders_are_written_whole(tmp_path):
    """A write that fails leaves what was there, of a file as of a folder."""
    file, folder = tmp_path / "a.yaml", tmp_path / "folder"
    save_text("old", file)
    with replaced(folder) as draft:
        (draft / "a").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        save_text("new \udc80", file)
    with pytest.raises(OSError, match="full"), replaced(folder) as draft:
        (draft / "a").write_text("new")
        raise OSError("full")
    assert file.read_text() == "old" and [f.read_text() for f in folder.iterdir()] == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "folder"]
