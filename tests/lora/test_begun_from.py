"""Runs that began from the adapter of a run that goes on meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from lora_runs import write
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidaccel.lora import run
from vidaccel.lora.checkpoints.begun_from import kept_teacher
from vidaccel.lora.checkpoints.checkpoint import CheckpointError
from vidaccel.lora.config import ConfigError
from vidaccel.lora.trainer import Stopped
from vidaccel.pipelines.files.run_folder import FILE

UNSEEN = {"validation": {"prompts": [], "clips": 0}}
GFT = {"recipe": "gft", "gft": {"max_scale": 4}, **UNSEEN}
FEW = {"recipe": "consistency", **UNSEEN}


def unfinished(folder: Path) -> Path:
    """The folder of a run with checkpoints and no result."""
    shutil.rmtree(folder / "run" / "adapter")
    return folder / "run"


def changed(file: str | Path) -> None:
    """Give every tensor of a LoRA other values."""
    with safe_open(file, "pt") as whole:
        facts = whole.metadata()
    save_file({name: value + 1 for name, value in load_file(file).items()}, file, facts)


def stopped(file: Path, stop_after) -> Path:
    """The settings of a run after its first step."""
    stop_after(1)
    with pytest.raises(Stopped):
        run(json.loads(file.read_text())["recipe"], file)
    return file


def test_what_a_lora_began_from_may_go_on_or_be_gone(tmp_path, text_base, stop_after):
    """Every checkpoint has what it held. Named otherwise, it is compared."""
    run("lora", write(tmp_path / "a", text_base, **UNSEEN))
    earlier = unfinished(tmp_path / "a")
    (saved,) = (earlier / "checkpoints").iterdir()
    other = shutil.copytree(saved / "adapter", tmp_path / "other") / FILE
    results = []
    for name in ("straight", "resumed"):
        file = write(tmp_path / name, text_base, lora={"start": str(earlier)}, **UNSEEN)
        if name == "resumed":
            stopped(file, stop_after)
            changed(saved / "adapter" / FILE)  # the run went on
        results.append(load_file(run("lora", file, resume="latest" if name == "resumed" else None)["lora"]))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
    changed(other)
    with pytest.raises(CheckpointError, match=r"not changed\): lora.start. lora.start: give what the check"):
        run("lora", file, ["train.steps=3", f"lora.start={other}"], "latest")
    shutil.rmtree(earlier)
    assert run("lora", file, ["train.steps=3"], "latest")
    assert run("lora", file, ["train.steps=4", "lora.start=null"], "latest")


def test_a_run_that_began_without_one_is_given_none(tmp_path, text_base, stop_after):
    """It had no effect, and stood in the settings of the result."""
    file = stopped(write(tmp_path, text_base, **UNSEEN), stop_after)
    with pytest.raises(ConfigError, match=r"lora.start is .*/a, and the run that is continued began without: leave it"):
        run("lora", file, [f"lora.start={tmp_path}/a"], "latest")


def test_the_teacher_is_kept_with_the_run(tmp_path, text_base, stop_after):
    """It teaches after a resume, too, whatever became of the run that made it."""
    adapter = run("gft", write(tmp_path / "a", text_base, **GFT))["lora"]
    few = {"steps": 2, "teacher_steps": 2, "guidance_scale": 2, "teacher": str(tmp_path / "a" / "run")}
    results = []
    for name in ("straight", "resumed"):
        file = write(tmp_path / name, text_base, consistency=few, **FEW)
        if name == "resumed":
            stopped(file, stop_after)
            changed(adapter)
        results.append(load_file(run("consistency", file, resume="latest" if name == "resumed" else None)["lora"]))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
    with pytest.raises(CheckpointError, match="not changed.*: consistency.teacher"):
        run("consistency", file, ["train.steps=3", f"consistency.teacher={adapter}"], "latest")
    kept = kept_teacher(tmp_path / "resumed" / "run")
    moved = shutil.copy(kept, tmp_path / "moved.safetensors")
    (last,) = (tmp_path / "resumed" / "run" / "checkpoints").glob("*2")
    assert run("consistency", file, ["train.steps=3", f"out={tmp_path}/elsewhere"], last)
    assert kept_teacher(tmp_path / "elsewhere").read_bytes() == kept.read_bytes()
    kept.unlink()  # as older versions kept none
    for out in ("another", "resumed/run"):
        with pytest.raises(CheckpointError, match=r"consistency.teacher: give the adapter as it was .* keeps no copy"):
            run("consistency", file, ["train.steps=3", f"out={tmp_path}/{out}"], last)
    assert run("consistency", file, ["train.steps=3", f"consistency.teacher={moved}"], "latest") and kept.is_file()


def test_a_teacher_is_not_taken_up_on_the_way(tmp_path, text_base, stop_after):
    """Nothing compared one with none."""
    few = {"steps": 2, "teacher_steps": 2, "guidance_scale": 2}
    file = stopped(write(tmp_path, text_base, consistency=few, **FEW), stop_after)
    with pytest.raises(ConfigError, match="consistency.teacher is own, and the run that is continued began without"):
        run("consistency", file, ["consistency.teacher=own"], "latest")


def test_a_teacher_that_cannot_be_kept_is_told_with_a_remedy(tmp_path, text_base):
    """It named a hidden temporary file."""
    run("gft", write(tmp_path / "a", text_base, **GFT))
    few = {"steps": 2, "teacher_steps": 2, "guidance_scale": 2, "teacher": str(tmp_path / "a" / "run")}
    file = write(tmp_path, text_base, consistency=few, **FEW)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "teacher").write_text("in its place")
    with pytest.raises(OSError, match=r"/teacher/pytorch\S* could not be written: .* See that it can be, and start"):
        run("consistency", file)
