"""A GPU whose memory runs out: one line that says what takes less and how to go on; validations that find it early."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from lora_runs import write
from safetensors.torch import load_file

from vidaccel.autoencoders.tiny import TinyVideoDecoder
from vidaccel.lora import run
from vidaccel.lora.__main__ import main
from vidaccel.lora.backbones.wan_own import WanModel
from vidaccel.lora.config import ConfigError
from vidaccel.lora.data.latents import Latents
from vidaccel.lora.data.sampler import without
from vidaccel.lora.footprint.memory import OutOfMemory
from vidaccel.lora.recipes.flow_phase import FlowPhase
from vidaccel.lora.recipes.lora import TrainLora
from vidaccel.lora.reconstruction import Reconstruction
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


def test_while_a_result_is_written_that_is_not_measured(tmp_path, text_base, monkeypatch):
    """What a validation or the training takes is no advice there."""
    file = write(tmp_path, text_base, train={"batch_size": 2})
    monkeypatch.setattr(TrainLora, "finish", full)
    with pytest.raises(OutOfMemory, match="memory while the result was written") as told:
        run("lora", file)
    for word in ("validation", "batch_size", "checkpointing=true", "data.sizes"):
        assert word not in str(told.value)
    assert str(told.value).endswith("continue with --resume latest.")


SMALL = {"frames": 4, "height": 32, "width": 32}


@pytest.fixture
def clips_of_an_autoencoder(tmp_path, monkeypatch):
    """Settings of an `autoencoder` that measures a clip of 12 frames, of the two videos that have so many, where no
    more than 8 fit on the GPU; and what is held out by each phase that begins."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, frames in (*((f"{n}.mp4", 8) for n in range(5)), *((f"long{n}.mp4", 16 + 8 * n) for n in range(2))):
        with imageio.get_writer(folder / name, fps=8, macro_block_size=2) as writer:
            for number in range(frames):
                writer.append_data(np.full((64, 64, 3), 8 * number, np.uint8))
    content = {
        "recipe": "autoencoder",
        "out": str(tmp_path / "run"),
        "model": {"latent_channels": 4, "block_out_channels": [8] * 7, "layers_per_block": [0] + [1] * 6},
        "data": {"kind": "videos", "folder": str(folder), "contact_sheet": 0, "sizes": [{**SMALL, "frames": 8}]},
        "phases": [{"name": name, "steps": 1, "batch_size": 2} for name in "ab"],
        "validation": {"clips": 1, "size": {**SMALL, "frames": 12}},
        "statistics_clips": 2,
        "loop": {"tracker": "none", "device": "cpu"},
    }
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps(content))
    forward, held = Reconstruction.forward, []

    def small_ones(self, video, adversarial=True, reconstruct=False):
        return full() if reconstruct and video.shape[2] > 8 else forward(self, video, adversarial, reconstruct)

    def seen(members, clips):
        held.append(sorted(clips))
        return without(members, clips)

    monkeypatch.setattr(Reconstruction, "forward", small_ones)
    monkeypatch.setattr("vidaccel.lora.recipes.reconstructing.without", seen)
    return file, held


def test_a_resume_may_measure_smaller_clips(clips_of_an_autoencoder, capsys):
    """Of the files that are held out since the run began, also at the resume that follows."""
    file, held = clips_of_an_autoencoder
    words = "in the validation after step 1 of phase a. A resume may change validation.size"
    with pytest.raises(OutOfMemory, match=words) as told:
        run("autoencoder", file)
    assert "gradient_checkpointing" not in str(told.value) and "batch_size" not in str(told.value)
    with pytest.raises(ConfigError, match="is 20x32x32, and 1 of the 1 clips .* give 12 frames or fewer"):
        run("autoencoder", file, [f"validation.size={json.dumps({**SMALL, 'frames': 20})}"], "latest")
    for _ in range(2):
        result = run("autoencoder", file, [f"validation.size={json.dumps(SMALL)}"], "latest")
        assert result["psnr"] > 0
    assert capsys.readouterr().out.count("validation.size is 4x32x32 from here on, and was 12x32x32") == 1
    assert len({tuple(clips) for clips in held}) == 1 and len(held) == 6


def test_what_the_recipe_refuses_is_no_advice(tmp_path, monkeypatch):
    """A run of `tiny_decoder`, which has no gradient checkpointing."""
    monkeypatch.setattr(Reconstruction, "forward", full)
    with pytest.raises(OutOfMemory, match="A resume may change phases.0.batch_size") as told:
        run("tiny_decoder", tiny_decoder(tmp_path))
    assert "gradient_checkpointing" not in str(told.value)


def test_a_tiny_decoder_is_written_before_it_is_measured(tmp_path, monkeypatch, capsys):
    """The autoencoder that it is compared with may need more memory than all of its training."""
    monkeypatch.setattr("vidaccel.lora.recipes.tiny_decoder.decoded", full)
    result = run("tiny_decoder", tiny_decoder(tmp_path))
    assert "seconds" in result and not any(name.startswith("autoencoder_") for name in result)
    assert "its own figures are left out" in capsys.readouterr().out
    assert TinyVideoDecoder.from_pretrained(result["decoder"]).dtype == torch.float32


def tiny_decoder(folder: Path) -> Path:
    """Settings of a run of `tiny_decoder`."""
    content = {
        "recipe": "tiny_decoder",
        "out": str(folder / "run"),
        "model": {"base": "demo-dc"},
        "decoder": {
            "block_out_channels": [8] * 6,
            "layers_per_block": 1,
            "time_growth": [1, 1, 1, 2, 2],
        },
        "data": {"kind": "demo", "clips": 6, "contact_sheet": 0, "sizes": [{"frames": 8, "height": 32, "width": 32}]},
        "phases": [{"name": "train", "steps": 1, "batch_size": 2}],
        "validation": {"clips": 1},
        "loop": {"tracker": "none", "device": "cpu"},
    }
    file = folder / "a.yaml"
    file.write_text(json.dumps(content))
    return file


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
