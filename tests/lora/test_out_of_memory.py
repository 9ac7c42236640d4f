"""A GPU whose memory runs out: one line that says what takes less and how to go on; validations that find it early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_runs import write
from safetensors.torch import load_file

from vidaccel.lora import run
from vidaccel.lora.__main__ import main
from vidaccel.lora.backbones.wan_own import WanModel
from vidaccel.lora.data.latents import Latents
from vidaccel.lora.memory import OutOfMemory
from vidaccel.lora.recipes.flow_phase import FlowPhase
from vidaccel.lora.stopping import Stopped, StopRequested


def full(*_, **__) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_in_training_it_is_one_line(tmp_path, text_base, monkeypatch, capsys):
    file = write(tmp_path, text_base, validation={"prompts": []})
    monkeypatch.setattr(FlowPhase, "loss", full)
    assert main(["lora", "--config", str(file)]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("Error: the GPU ran out of memory while the phase train was trained. A resume may change")
    for named in (
        "loop.gradient_checkpointing=true",
        "model.offload_blocks",
        "model.quantise=int8",
        "train.batch_size (with as many times the gradient_accumulation_steps)",
        "nothing was trained yet: start again without --resume.",
    ):
        assert named in line
    assert "validation.prompts" not in line


def test_in_a_validation_nothing_is_lost(tmp_path, text_base, monkeypatch):
    """The checkpoint is there, and a resume as the message says ends the run."""
    file = write(tmp_path, text_base, loop={"gradient_checkpointing": True}, train={"batch_size": 1})
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory) as told:
        patch.setattr(WanModel, "sample", full)
        run("lora", file)
    assert "in the validation after step 2 of phase train. A resume may change validation.prompts=[]" in str(told.value)
    assert str(told.value).endswith("continue with --resume latest.")
    assert "gradient_checkpointing=true" not in str(told.value) and "batch_size" not in str(told.value)
    monkeypatch.setattr(WanModel, "sample", full)
    assert Path(run("lora", file, ["validation.prompts=[]"], "latest")["lora"]).is_file()


def test_while_clips_are_encoded(tmp_path, text_base, monkeypatch):
    monkeypatch.setattr(Latents, "fill", full)
    words = "while clips were encoded.*model.autoencoder_tiling=true.* what is encoded is used again"
    with pytest.raises(OutOfMemory, match=words):
        run("lora", write(tmp_path, text_base), encode_only=True)
    with pytest.raises(OutOfMemory, match="while the phase train was prepared"):
        run("lora", tmp_path / "a.yaml")


def test_a_validation_before_the_first_step(tmp_path, text_base):
    """Of what is not trained yet; nothing of the training depends on it."""
    file = write(tmp_path, text_base)
    plain = run("lora", file)["lora"]
    first = run("lora", file, ["loop.validate_first=true", f"out={tmp_path / 'first'}"])["lora"]
    one, two = (load_file(file) for file in (plain, first))
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    steps = [row["step"] for row in rows(tmp_path / "first") if "validation_error" in row]
    assert steps == [0, 2] and [row["step"] for row in rows(tmp_path / "run") if "validation_error" in row] == [2]
    assert (tmp_path / "first" / "validation" / "00000000.png").is_file()


def test_it_is_of_each_phase_and_a_stop_in_it_saves_nothing(tiny_settings, run_tiny, tiny_phase, monkeypatch):
    settings = tiny_settings(loop={"validate_first": True})
    seen, validate = [], tiny_phase.validate

    def recorded(self, model, folder, step):
        seen.append((self.name, step, folder.name))
        return validate(self, model, folder, step)

    monkeypatch.setattr(tiny_phase, "validate", recorded)
    run_tiny(settings)
    wanted = [("first", 0, "validation"), ("first", 3, "validation")]
    wanted += [("second", 3, "before_second"), ("second", 6, "validation")]
    assert seen == wanted

    def stopped(self, model, folder, step):
        self.recipe.process.stop.requested = True
        raise StopRequested

    monkeypatch.setattr(tiny_phase, "validate", stopped)
    with pytest.raises(Stopped, match="before the first step of phase first; there is nothing to resume yet"):
        run_tiny(tiny_settings("stopped", loop={"validate_first": True}))
