"""Recipe `autoencoder`, with a real `AutoencoderDCV` at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from vidaccel import demo
from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.autoencoders.live_bytes import LiveBytes
from vidaccel.lora import run
from vidaccel.lora.__main__ import main
from vidaccel.lora.config import ConfigError
from vidaccel.lora.optim import clip_gradients
from vidaccel.lora.reconstruction import LossSettings, PatchDiscriminator, Reconstruction, quality

MODEL = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8, 8, 8, 8, 8],
    "layers_per_block": [0, 1, 1, 1, 1, 1, 1],
    "chunk_size": 8,
}
SIZE = {"frames": 8, "height": 32, "width": 32}


def write(folder: Path, **sections) -> Path:
    """Settings of a run of 2 steps, in `folder/a.yaml`."""
    content = {
        "recipe": "autoencoder",
        "out": str(folder / "run"),
        "model": MODEL,
        "data": {"kind": "demo", "clips": 8, "contact_sheet": 0, "sizes": [SIZE]},
        "phases": [{"name": "train", "steps": 2, "learning_rate": 0.005, "batch_size": 2, "ema_decay": 0.9}],
        "validation": {"clips": 1},
        "statistics_clips": 3,
        "loop": {"tracker": "none", "device": "cpu", "log_every": 1},
        **sections,
    }
    file = folder / "a.yaml"
    file.write_text(json.dumps(content))
    return file


def test_the_result_is_a_folder_with_the_measured_scale(tmp_path):
    result = run("autoencoder", write(tmp_path))
    autoencoder = AutoencoderDCV.from_pretrained(result["autoencoder"])
    assert autoencoder.config.scaling_factor == pytest.approx(1 / result["latent_std"], rel=1e-4)
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    state = autoencoder.state_dict()
    assert all(torch.equal(state[name.removeprefix("autoencoder.")], value) for name, value in trained.items())
    assert result["psnr"] > 0 and 0 < result["ssim"] <= 1
    assert (tmp_path / "run" / "validation" / "00000002.png").is_file()


def test_training_reconstructs_better(tmp_path):
    phases = [{"name": "train", "steps": 25, "learning_rate": 0.01, "batch_size": 2, "optimizer": "muon"}]
    run("autoencoder", write(tmp_path, phases=phases))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [row["l1"] for row in rows if "l1" in row]
    assert min(losses[-3:]) < 0.6 * losses[0]


def test_the_scale_is_measured_over_sizes_with_a_batch_of_their_own(tmp_path):
    assert run("autoencoder", write(tmp_path), ["data.sizes.0.batch_size=2"])["latent_std"] > 0


def test_decoder_alone(tmp_path, autoencoder_folder):
    phases = [{"name": "decoder", "steps": 1, "train": "decoder", "learning_rate": 0.01}]
    run("autoencoder", write(tmp_path, phases=phases, model={"start": str(autoencoder_folder)}))
    before = AutoencoderDCV.from_pretrained(autoencoder_folder).state_dict()
    after = AutoencoderDCV.from_pretrained(tmp_path / "run" / "autoencoder").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    # The latents are as they were, so what a transformer sees must be, too.
    assert AutoencoderDCV.from_pretrained(tmp_path / "run" / "autoencoder").config.scaling_factor == 1.5


def test_phases_follow_one_another(tmp_path):
    small = {"frames": 4, "height": 32, "width": 32, "batch_size": 3}
    phases = [{"name": "small", "steps": 1, "sizes": [small]}, {"name": "full", "steps": 1, "ema_decay": 0.5}]
    run("autoencoder", write(tmp_path, phases=phases))
    first, second = (load_file(tmp_path / "run" / "phases" / f"{name}.safetensors") for name in ("small", "full"))
    assert first.keys() == second.keys()
    difference = max((first[name] - second[name]).abs().max() for name in first)
    assert 0 < difference < 3e-4  # one step of Adam at a rate of 1e-4, from where the first phase ended


def test_a_video_folder_without_captions(tmp_path, video_folder):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.mp4").write_bytes((video_folder / f"{name}.mp4").read_bytes())
    sizes = [{"frames": 8, "height": 32, "width": 64}]
    run("autoencoder", write(tmp_path, data={"kind": "videos", "folder": str(folder), "sizes": sizes}))
    assert (tmp_path / "run" / "autoencoder" / "config.json").is_file()


def test_adversarial_training(tmp_path):
    loss = {"adversarial": 0.1, "adversarial_from": 1, "discriminator_rate": 2.0}
    run("autoencoder", write(tmp_path, loss=loss))
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    assert any(name.startswith("discriminator.") for name in trained)
    shipped = AutoencoderDCV.from_pretrained(tmp_path / "run" / "autoencoder").state_dict()
    assert not any("discriminator" in name for name in shipped)


def test_each_side_is_clipped_by_itself(tmp_path):
    """The norm of the discriminator's gradients was in that of the autoencoder's, and made its steps smaller."""
    loss = {"adversarial": 0.1, "adversarial_from": 100}
    run("autoencoder", write(tmp_path, loss=loss))
    run("autoencoder", tmp_path / "a.yaml", [f"out={tmp_path / 'alone'}", "loss.adversarial=0"])
    both, alone = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("run", "alone")
    )
    first, wanted = (next(row for row in rows if "loss" in row) for rows in (both, alone))
    assert first["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-4)
    assert first["gradient_norm_discriminator"] > 0 and "gradient_norm_discriminator" not in wanted
    weights = [load_file(tmp_path / name / "phases" / "train.safetensors") for name in ("run", "alone")]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-4, atol=1e-6)


def test_each_part_of_a_model_has_its_own_bound():
    named = {"a": torch.nn.Parameter(torch.zeros(2)), "discriminator.b": torch.nn.Parameter(torch.zeros(2))}
    for parameter, gradient in zip(named.values(), ([3.0, 4.0], [300.0, 400.0]), strict=True):
        parameter.grad = torch.tensor(gradient)
    norms = clip_gradients(Accelerator(cpu=True), named, lambda name: name.rpartition(".")[0], 1.0)
    assert {name: round(float(norm)) for name, norm in norms.items()} == {
        "gradient_norm": 5,
        "gradient_norm_discriminator": 500,
    }
    for parameter in named.values():
        torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-4, atol=1e-4)


def test_each_side_is_blind_to_the_other():
    """The autoencoder's term must not move the discriminator, nor the discriminator's the autoencoder."""
    torch.manual_seed(0)
    module = Reconstruction(AutoencoderDCV(**MODEL), LossSettings(adversarial=1.0))
    video, made = torch.rand(1, 3, 8, 32, 32), torch.rand(1, 3, 8, 32, 32, requires_grad=True)
    judged, versus = module._adversarial(video, made)
    judged.backward(retain_graph=True)
    assert made.grad.any() and all(p.grad is None for p in module.discriminator.parameters())
    made.grad = None
    versus.backward()
    assert made.grad is None and all(p.grad is not None for p in module.discriminator.parameters())


def test_the_discriminator_looks_at_patches():
    assert PatchDiscriminator(8)(torch.rand(2, 3, 8, 32, 32)).shape == (2, 1, 2, 4, 4)


def test_quality():
    video = torch.rand(1, 3, 4, 32, 32) * 2 - 1
    same = quality([(video, video)])
    assert same["psnr"] >= 99 and same["ssim"] == pytest.approx(1.0)
    grey = torch.zeros(1, 3, 4, 32, 32)
    assert quality([(grey + 0.2, grey)])["psnr"] == pytest.approx(20.0, abs=1e-3)


def test_quality_takes_little_memory():
    """SSIM takes ten times the memory of what it compares, which of all clips of a validation would not fit."""
    a, b = (torch.rand(1, 3, 13, 32, 32) * 2 - 1 for _ in range(2))
    pairs = [(a, b), (a[:, :, :6], b[:, :, 7:])]
    with LiveBytes() as one:
        quality([(a[:, :, :1], b[:, :, :1])])
    with LiveBytes() as all_of_them:
        measured = quality(pairs)
    assert all_of_them.peak < 1.1 * one.peak
    psnr = [-10 * ((a - b) / 2).square().mean(dim=(0, 1, 3, 4)).log10() for a, b in pairs]
    assert measured["psnr"] == pytest.approx(float(torch.cat(psnr).mean()), abs=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    run("autoencoder", write(tmp_path))
    run("autoencoder", tmp_path / "a.yaml", [f"out={tmp_path / 'second'}", "loop.gradient_checkpointing=true"])
    first, second = (load_file(tmp_path / name / "phases" / "train.safetensors") for name in ("run", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"loss": {"perceptual": 1.0}}, "loss.perceptual needs .*or set it to 0"),
        ({"loss": {"l1": 0}}, "loss.l1, mse, edges and perceptual are all 0"),
        ({"phases": [{"steps": 1}, {"steps": 1}]}, "phases are named train, train"),
        ({"phases": []}, "phases: no phase has steps, so nothing would be trained"),
        ({"phases": [{"steps": 0}]}, "phases: no phase has steps"),
        (
            {"phases": [{"steps": 1, "optimizer": "muon"}], "loss": {"adversarial": 1, "discriminator_rate": 2}},
            "phases.0.optimizer is muon",
        ),
        ({"data": {"sizes": [{"frames": 8, "height": 40, "width": 32}]}}, "40x32 is no multiple of 32"),
        ({"data": {"sizes": [{"frames": 9, "height": 32, "width": 32}]}}, "9 frames are no multiple of 4"),
        ({"model": {**MODEL, "chunk_size": 6}}, "chunk_size is 6"),
        ({"model": {"start": "nowhere"}}, "model.start: nowhere is no folder here"),
        (
            {"phases": [{"steps": 1, "max_grad_nrom": 1}]},
            'phases.0.max_grad_nrom is not known: did you mean "max_grad_norm"',
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, sections, words):
    with pytest.raises(ConfigError, match=words):
        run("autoencoder", write(tmp_path, **sections))
    assert not (tmp_path / "run").exists()


def test_the_built_in_one_is_a_start(tmp_path):
    sections = {"phases": [{"name": "train", "steps": 1, "batch_size": 1}], "model": {"start": "demo-dc"}}
    result = run("autoencoder", write(tmp_path, **sections))
    assert AutoencoderDCV.from_pretrained(result["autoencoder"]).config.latent_channels == 32


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("nowhere", 'model.start: nowhere is no folder here, no hub id .* the built-in "demo-dc"'),
        (str(demo.path() / "vae"), "vae is a AutoencoderKLWan; give an AutoencoderDCV"),
    ],
)
def test_a_start_that_is_none(tmp_path, start, words):
    with pytest.raises(ConfigError, match=words):
        run("autoencoder", write(tmp_path, model={"start": start}))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (
            {"frames": 8, "height": 40, "width": 32},
            r"data.sizes: 40x32 is no multiple of 32, .* of model.start .* 32x32",
        ),
        ({"frames": 8, "height": 32, "width": 32}, "8 frames are no whole number of latent frames .* give 5 or 9"),
    ],
)
def test_sizes_that_the_start_does_not_take(tmp_path, size, words):
    _padded().save_pretrained(tmp_path / "start")
    data = {"kind": "demo", "clips": 8, "contact_sheet": 0, "sizes": [{"frames": 9, "height": 32, "width": 32}, size]}
    with pytest.raises(ConfigError, match=words):
        run("autoencoder", write(tmp_path, model={"start": str(tmp_path / "start")}, data=data))
    assert not (tmp_path / "run").exists()


def test_a_start_that_puts_frames_before_a_video(tmp_path):
    _padded().save_pretrained(tmp_path / "start")
    data = {"kind": "demo", "clips": 8, "contact_sheet": 0, "sizes": [{"frames": 9, "height": 32, "width": 32}]}
    result = run("autoencoder", write(tmp_path, model={"start": str(tmp_path / "start")}, data=data))
    assert AutoencoderDCV.from_pretrained(result["autoencoder"]).config.pad_frames == 3 and result["psnr"] > 0


def _padded() -> AutoencoderDCV:
    torch.manual_seed(0)
    return AutoencoderDCV(**MODEL, pad_frames=3)


def test_the_recipe_must_be_the_one_of_the_settings(tmp_path):
    with pytest.raises(ConfigError, match="is for the recipe autoencoder, not for ae_adapt"):
        run("ae_adapt", write(tmp_path))


def test_the_command(tmp_path, capsys, monkeypatch):
    file = str(write(tmp_path))
    assert main(["autoencoder", "--config", file, "--set", "phases.0.steps=1"]) == 0
    assert "autoencoder: " in capsys.readouterr().out
    assert main(["autoencoder", "--config", file, "--set", "phases.0.steps=-1"]) == 2
    assert "phases.0.steps is -1: it must be at least 0" in capsys.readouterr().err
    assert main(["autoencoder", "--config", file]) == 2
    assert "holds a run already" in capsys.readouterr().err
    monkeypatch.setattr("vidaccel.lora.run", lambda *a: (_ for _ in ()).throw(OSError("the share is gone")))
    assert main(["autoencoder", "--config", file]) == 1
    assert capsys.readouterr().err == "Error: the share is gone\n"


def test_settings_are_checked_before_torch_is_imported(tmp_path):
    code = (
        "import sys; from vidaccel.lora.config import build; from vidaccel.lora import settings;"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    root = str(Path(__file__).parents[2])
    if Path(root).name != "vidaccel":
        (tmp_path / "vidaccel").symlink_to(root, target_is_directory=True)
        root = str(tmp_path / "vidaccel")
    environment = {"PYTHONPATH": str(Path(root).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
