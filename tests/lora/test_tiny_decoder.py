"""Recipe `tiny_decoder`, on the autoencoders of the built-in models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tiny_decoders import decoder_for

from vidaccel import demo
from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.autoencoders.tiny import TinyVideoDecoder
from vidaccel.lora import run
from vidaccel.lora.config import ConfigError
from vidaccel.lora.data.demo import DemoScenes
from vidaccel.lora.data.sampler import Pick
from vidaccel.lora.distributed.generators import Place
from vidaccel.lora.phase_run import Diverged
from vidaccel.lora.recipes.tiny_decoder import FrozenEncoder, decoded
from vidaccel.lora.reconstruction import LossSettings, Reconstruction

SHAPE = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "patch_size": 4}
SIZE = {"frames": 8, "height": 64, "width": 64}


def write(folder: Path, **sections) -> Path:
    """Settings of a run of 2 steps, in `folder/t.yaml`."""
    content = {
        "recipe": "tiny_decoder",
        "out": str(folder / "run"),
        "model": {"base": "demo-dc"},
        "decoder": SHAPE,
        "data": {"kind": "demo", "clips": 8, "sizes": [SIZE]},
        "phases": [{"name": "train", "steps": 2, "learning_rate": 0.005, "batch_size": 2, "ema_decay": 0.9}],
        "validation": {"clips": 1},
        "loop": {"tracker": "none", "device": "cpu", "log_every": 1},
        **sections,
    }
    file = folder / "t.yaml"
    file.write_text(json.dumps(content))
    return file


def test_the_result_is_a_decoder_of_the_autoencoders_latents(tmp_path):
    result = run("tiny-decoder", write(tmp_path))
    decoder = TinyVideoDecoder.from_pretrained(result["decoder"])
    config = decoder.config
    assert (config.autoencoder, config.latent_channels, config.first_frame_alone) == ("AutoencoderDCV", 32, False)
    trained = load_file(tmp_path / "run" / "phases" / "train.safetensors")
    assert {name.removeprefix("autoencoder.decoder.") for name in trained} == set(decoder.state_dict())
    assert all(
        torch.equal(trained[f"autoencoder.decoder.{name}"], value) for name, value in decoder.state_dict().items()
    )
    assert result["psnr"] > 0 and result["autoencoder_psnr"] > result["psnr"]  # two steps teach little
    assert (tmp_path / "run" / "validation" / "00000002.png").is_file()


def test_training_decodes_better(tmp_path):
    phases = [{"name": "train", "steps": 60, "learning_rate": 0.005, "batch_size": 4, "optimizer": "muon"}]
    sizes = [{"frames": 4, "height": 32, "width": 32}]
    data = {"kind": "demo", "clips": 16, "sizes": sizes}
    first = run("tiny_decoder", write(tmp_path, data=data, out=str(tmp_path / "first")))
    result = run("tiny_decoder", write(tmp_path, data=data, phases=phases))
    assert result["psnr"] > first["psnr"] + 3


def test_it_goes_on_to_the_bit_where_it_was_stopped(tmp_path):
    phases = [{"name": "train", "steps": 4, "learning_rate": 0.005, "batch_size": 2, "ema_decay": 0.9}]
    loop = {"tracker": "none", "device": "cpu", "log_every": 1, "save_every": 2}
    run("tiny_decoder", write(tmp_path, phases=phases, loop=loop))
    file = write(tmp_path, phases=phases, loop=loop, out=str(tmp_path / "again"))
    whole = load_file(tmp_path / "run" / "decoder" / "diffusion_pytorch_model.safetensors")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    checkpoint.rename(tmp_path / "again" / "checkpoints" / checkpoint.name)
    run("tiny_decoder", file, resume="latest")
    again = load_file(tmp_path / "again" / "decoder" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_target_may_be_what_the_autoencoder_makes(tmp_path):
    """Its loss is that of the decoder's frames against the autoencoder's own, which are not the clips."""
    results = {}
    for target in ("frames", "decoded"):
        out = tmp_path / target
        run("tiny_decoder", write(tmp_path, model={"base": "demo-dc", "target": target}, out=str(out)))
        results[target] = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert results["frames"]["latent_std"] == results["decoded"]["latent_std"]
    assert results["frames"]["l1"] != results["decoded"]["l1"]
    vae = AutoencoderDCV.from_pretrained(demo.path("demo-dc"), subfolder="vae")
    decoder = TinyVideoDecoder(32, **SHAPE, first_frame_alone=False)
    video = DemoScenes(8).pixels(Pick(0, (8, 64, 64), Place(0, 0, 1, 0)))[None]
    model = FrozenEncoder(vae, decoder)
    own = decoded(vae, vae.encode(video).latent)
    module = Reconstruction(model, LossSettings(), lambda video, encoded: decoded(vae, encoded.own))
    made = model(video).sample
    torch.testing.assert_close(module(video)[1]["l1"], (made - own).abs().mean().detach())


def test_the_autoencoder_keeps_its_precision_and_is_no_part_of_what_is_trained():
    vae = AutoencoderDCV.from_pretrained(demo.path("demo-dc"), subfolder="vae").requires_grad_(False)
    model = FrozenEncoder(vae, TinyVideoDecoder(32, **SHAPE, first_frame_alone=False))
    assert all(name.startswith("decoder.") for name in model.state_dict())
    video = DemoScenes(8).pixels(Pick(0, (8, 64, 64), Place(0, 0, 1, 0)))[None]
    plain = model.encode(video)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.encode(video)
        sample = model.decode(mixed.latent).sample
    assert torch.equal(plain.latent, mixed.latent) and torch.equal(plain.own, mixed.own)
    assert sample.dtype == torch.float32 and sample.requires_grad and not mixed.latent.requires_grad


def test_a_run_in_bfloat16(tmp_path):
    model = {"base": "demo-dc", "autoencoder_dtype": "bfloat16"}
    loop = {"tracker": "none", "device": "cpu", "log_every": 1, "mixed_precision": "bf16"}
    result = run("tiny_decoder", write(tmp_path, model=model, loop=loop))
    assert result["psnr"] > 0 and result["seconds"] < result["autoencoder_seconds"]


def test_a_file_for_an_autoencoder_without_a_first_frame_of_its_own(tmp_path):
    """A file in the layout of TAEHV does not say that no frames are to be dropped; the autoencoder does."""
    first = run("tiny_decoder", write(tmp_path))
    file = tmp_path / "mine.safetensors"
    save_file(load_file(Path(first["decoder"]) / "diffusion_pytorch_model.safetensors"), file)
    for name, start in (("file", file), ("folder", first["decoder"])):
        result = run("tiny_decoder", write(tmp_path, decoder={"start": str(start)}, out=str(tmp_path / name)))
        config = TinyVideoDecoder.from_pretrained(result["decoder"]).config
        assert (config.first_frame_alone, config.autoencoder) == (False, "AutoencoderDCV")


def test_a_start_of_another_autoencoder_is_refused(tmp_path, published):
    with pytest.raises(ConfigError, match="decoder.start: .* is for the latents of an AutoencoderKLWan, and the auto"):
        run("tiny_decoder", write(tmp_path, decoder={"start": str(tmp_path / "lighttaew2_1.safetensors")}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"no safetensors"])
def test_a_broken_start_is_refused(tmp_path, content):
    (tmp_path / "taew2_1.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="decoder.start: .*taew2_1.safetensors"):
        run("tiny_decoder", write(tmp_path, decoder={"start": str(tmp_path / "taew2_1.safetensors")}))


def test_adapter_only_weights_whose_autoencoder_lies_elsewhere(tmp_path):
    adapter = tmp_path / "run" / "adapter"
    shutil.copytree(demo.path("demo-dc"), adapter, ignore=shutil.ignore_patterns("vae", "transformer"))
    shutil.copytree(demo.path("demo-dc") / "vae", tmp_path / "run" / "pipeline" / "vae")
    facts = json.loads((adapter / "adapter.json").read_text())
    (adapter / "adapter.json").write_text(json.dumps({**facts, "autoencoder": "../pipeline/vae"}))
    result = run("tiny_decoder", write(tmp_path, model={"base": str(adapter)}, out=str(tmp_path / "tiny")))
    assert Path(result["decoder"], "config.json").is_file()


def test_nothing_is_kept_of_a_loss_that_is_no_number(tmp_path, monkeypatch):
    forward = Reconstruction.forward

    def broken(self, *args, **kwargs):
        loss, parts = forward(self, *args, **kwargs)
        return loss * float("nan"), parts

    monkeypatch.setattr(Reconstruction, "forward", broken)
    with pytest.raises(Diverged, match="the loss of phase train is nan"):
        run("tiny_decoder", write(tmp_path))
    assert not (tmp_path / "run" / "decoder").exists()


def test_the_average_is_what_is_written(tmp_path):
    results = {}
    for decay in (0.0, 0.9):
        phases = [{"name": "train", "steps": 3, "learning_rate": 0.05, "ema_decay": decay}]
        result = run("tiny_decoder", write(tmp_path, phases=phases, out=str(tmp_path / f"run{decay}")))
        results[decay] = load_file(Path(result["decoder"]) / "diffusion_pytorch_model.safetensors")
        if decay:
            ema = load_file(tmp_path / f"run{decay}" / "checkpoints" / "step_00000003" / "ema.safetensors")
            assert all(torch.equal(ema[f"autoencoder.decoder.{k}"], v) for k, v in results[decay].items())
    assert any(not torch.equal(value, results[0.9][name]) for name, value in results[0.0].items())


@pytest.fixture
def published(tmp_path) -> TinyVideoDecoder:
    """One of LightX2V's by its name, `lighttaew2_1.safetensors`, for the built-in Wan model; random weights."""
    decoder = decoder_for(AutoencoderKLWan.from_pretrained(demo.path(), subfolder="vae"))
    save_file(decoder.state_dict(), tmp_path / "lighttaew2_1.safetensors")
    return decoder


def test_one_that_was_published_is_trained_further_in_its_own_scale(tmp_path, published):
    data = {"kind": "demo", "clips": 8, "sizes": [{"frames": 5, "height": 64, "width": 64}]}
    decoder = {"start": str(tmp_path / "lighttaew2_1.safetensors"), "file_dtype": "float16"}
    result = run("tiny_decoder", write(tmp_path, model={"base": "demo"}, decoder=decoder, data=data))
    trained = TinyVideoDecoder.from_pretrained(result["decoder"])
    assert trained.config.latents == "autoencoder" and trained.config.first_frame_alone
    before, after = published.state_dict(), trained.float().state_dict()
    assert any(not torch.allclose(before[name], after[name], atol=1e-3) for name in before)
    stored = load_file(Path(result["decoder"]) / "diffusion_pytorch_model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.float16}


def test_the_ready_settings_for_wan_run(tmp_path, published, video_folder):
    changes = {
        "out": tmp_path / "run",
        "model.base": "demo",
        "decoder.start": tmp_path / "lighttaew2_1.safetensors",
        "data.folder": video_folder,
        "data.sizes": [{"frames": 5, "height": 32, "width": 32}],
        "data.workers": 0,
        "phases.0.steps": 2,
        "phases.0.batch_size": 1,
        "validation.clips": 1,
        "loop.device": "cpu",
        "loop.mixed_precision": "no",
    }
    result = run(
        "tiny_decoder", "wan2.1_tiny_decoder", [f"{k}={json.dumps(v, default=str)}" for k, v in changes.items()]
    )
    assert Path(result["decoder"], "config.json").is_file()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"decoder": {**SHAPE, "patch_size": 2}},
            r"makes 4 frames and 16 pixels .* AutoencoderDCV, has made one of 4 and 32: set decoder.time_growth to "
            r"\[1, 2, 2\], decoder.patch_size to 4, and give 4 numbers in decoder.block_out_channels",
        ),
        (
            {"decoder": {"block_out_channels": [8, 8], "time_growth": [2]}},
            r"makes 2 frames and 2 pixels .* set decoder.time_growth to \[2, 2\], decoder.patch_size to 8, and give 3",
        ),
        (
            {"model": {"base": "demo-dc", "target": "latents"}},
            "model.target is 'latents', but must be one of frames, decoded",
        ),
        ({"decoder": {**SHAPE, "time_growth": [1, 3, 2]}}, "time_growth has 3: each step makes 1 or 2"),
        ({"decoder": {"start": "nowhere"}}, "decoder.start: nowhere is no file and no folder here"),
        ({"model": {"base": "nowhere"}}, "model.base: nowhere is no folder here"),
        ({"loss": {"latent": 0.1}}, "loss.latent is of latents, which this recipe leaves"),
        (
            {"data": {"kind": "demo", "clips": 8, "sizes": [{"frames": 9, "height": 64, "width": 64}]}},
            "data.sizes: 9 frames are no whole number of latent frames .* give 8 or 12",
        ),
        (
            {"data": {"kind": "demo", "clips": 8, "sizes": [{"frames": 8, "height": 48, "width": 64}]}},
            "data.sizes: 48x64 is no multiple of 32, .* give 64x64",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, sections, words):
    with pytest.raises(ConfigError, match=words):
        run("tiny_decoder", write(tmp_path, **sections))
    assert not (tmp_path / "run" / "decoder").exists()
