from __future__ import annotations

import functools
import json
import shlex
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from typer.testing import CliRunner

from vidaccel.demo import modeling
from vidaccel.demo.optimizer import MuonWithAdamW
from vidaccel.demo.train import app
from vidaccel.demo.train_transformer import (
    Stage,
    build_model,
    object_weights,
    package,
    sample_sigmas,
    train_transformer,
)
from vidaccel.demo.train_vae import decode_unclamped, train_decoder, train_vae, vae_batch
from vidaccel.demo.training import LoopConfig, learning_rate


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained_vae(tmp_path_factory):
    """A folder with an untrained autoencoder in it."""
    out = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    modeling.build_vae().save_pretrained(out / "vae")
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_rate_warms_up_and_falls():
    config = LoopConfig(steps=100, learning_rate=1.0, warmup=10)
    assert learning_rate(0, config) == 0.1 and learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(55, config) == pytest.approx(0.51) and learning_rate(100, config) == pytest.approx(0.02)


@pytest.mark.parametrize(
    "bad, message",
    [({"steps": 0}, "steps is 0"), ({"ema_decay": 1.0}, "ema_decay"), ({"learning_rate": 0.0}, "learning_rate")],
)
def test_bad_settings_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(**({"steps": 1} | bad))
    with pytest.raises(ValueError, match="multiple of 16"):
        Stage(steps=1, size=40, batch_size=1, clips=1)


def test_noise_levels_follow_the_shifted_grid():
    sigma = sample_sigmas(4000, torch.Generator().manual_seed(0))
    assert sigma.min() > 0 and sigma.max() < 1
    assert sigma.median().item() == pytest.approx(0.75, abs=0.01)  # shift 3 takes 1/2 to 3/4
    focused = sample_sigmas(4000, torch.Generator().manual_seed(0), focus=1.0)
    assert focused.median().item() == pytest.approx(torch.tensor(0.9).sigmoid().item(), abs=0.01)
    middle = [((s > 0.5) & (s < 0.85)).float().mean() for s in (sigma, focused)]
    assert middle[1] > 1.5 * middle[0]
    assert len(sample_sigmas(5, torch.Generator().manual_seed(0), focus=0.5)) == 5


def test_the_object_counts_more_than_the_background():
    latents = torch.zeros(2, 8, 3, 8, 8)
    latents[0, :, :, 2:4, 3:5] = 2.0
    weights = object_weights(latents, 4.0)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3, 4)), torch.ones(2))
    near = weights[0, 0] > 1
    assert near[:, 1:5, 2:6].all() and near.sum() == 3 * 16
    torch.testing.assert_close(weights[0, 0, 0, 2, 3], 4 * weights[0, 0, 0, 7, 7])
    torch.testing.assert_close(weights[1], torch.ones(1, 3, 8, 8))  # nothing to see: all alike


def test_a_single_row_of_latents_has_an_object_too():
    latents = torch.zeros(1, 8, 2, 1, 6)
    latents[..., 2] = 2.0
    weights = object_weights(latents, 4.0)
    assert (weights[0, 0, 0, 0] > 1).tolist() == [False, True, True, True, False, False]
    torch.testing.assert_close(object_weights(latents[..., :1], 4.0), torch.ones(1, 1, 2, 1, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_are_matrices_to_muon(layout):
    """The update of a convolution is that of torch's Muon on [out, in * kernel], wherever the state comes from."""
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=layout))
    matrix = torch.nn.Parameter(kernel.detach().flatten(1).clone())
    ours = MuonWithAdamW([("weight", kernel)], lr=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for number in range(4):
        if number == 2:
            state = ours.state_dict()
            ours = MuonWithAdamW([("weight", kernel)], lr=0.1)
            ours.load_state_dict(state)
        kernel.grad = torch.randn(6, 4, 3, 3)
        matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        theirs.step()
        assert torch.equal(kernel.flatten(1), matrix)


def test_muon_fits_a_regression_and_treats_vectors_as_adamw_does():
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8)
    inputs = torch.randn(64, 16)
    targets = inputs @ torch.randn(16, 8) + 1.0
    bias = layer.bias.detach().clone().requires_grad_()
    adam = torch.optim.AdamW([bias], lr=0.05, betas=(0.9, 0.98), weight_decay=0.01)
    muon = MuonWithAdamW(layer.named_parameters(), lr=0.05)
    first = None
    for _ in range(200):
        loss = (layer(inputs) - targets).square().mean()
        first = first or loss.item()
        muon.zero_grad()
        loss.backward()
        bias.grad = layer.bias.grad.clone()
        muon.step()
        adam.step()
    assert loss.item() < 0.05 * first
    torch.testing.assert_close(layer.bias, bias, atol=1e-4, rtol=1e-4)


def test_decoding_without_the_clamp_equals_the_stock_decoder():
    torch.manual_seed(0)
    vae = modeling.build_vae().eval()
    with torch.no_grad():
        latents = vae.encode(vae_batch(0, 300)[:1]).latent_dist.mode()
        ours, stock = decode_unclamped(vae, latents), vae.decode(latents).sample
    assert latents.shape == (1, 8, 3, 8, 8) and stock.shape == (1, 3, 9, 64, 64)
    torch.testing.assert_close(ours.clamp(-1, 1), stock)


def test_the_autoencoder_trains_and_resumes_as_if_never_stopped(tmp_path, monkeypatch):
    def batch(seed, step, crash_at=None):
        if step == crash_at:
            raise KeyboardInterrupt
        return vae_batch(seed, 0)[:4]

    monkeypatch.setattr("vidaccel.demo.train_vae.vae_batch", batch)
    monkeypatch.setattr("vidaccel.demo.train_vae.STATISTICS_CLIPS", 1)
    config = LoopConfig(steps=3, warmup=1, save_every=1, log_every=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_vae(whole, config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vidaccel.demo.train_vae.vae_batch", functools.partial(batch, crash_at=2))
        train_vae(parts, config)
    assert not (parts / "vae").exists()
    train_vae(parts, config)
    losses = [[r["loss"] for r in rows(folder / "vae.jsonl")] for folder in (whole, parts)]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    first, second = (load_file(f / "vae/diffusion_pytorch_model.safetensors") for f in (whole, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)
    config = json.loads((whole / "vae/config.json").read_text())
    assert len(config["latents_std"]) == 8 and min(config["latents_std"]) > 0 != config["latents_mean"][0]


def test_training_the_decoder_leaves_the_latents_alone(trained_vae, tmp_path, monkeypatch):
    monkeypatch.setattr("vidaccel.demo.train_vae.decoder_batch", lambda seed, step: vae_batch(seed, 100)[:1])
    out = tmp_path / "out"
    shutil.copytree(trained_vae, out)
    train_decoder(out, LoopConfig(steps=1, warmup=1, log_every=1))
    before, after = (load_file(f / "vae/diffusion_pytorch_model.safetensors") for f in (trained_vae, out))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv"}
    with pytest.raises(FileNotFoundError, match="train the autoencoder first"):
        train_decoder(tmp_path, LoopConfig(steps=1))


def test_the_transformer_trains_resumes_and_exports(trained_vae, tmp_path, monkeypatch):
    stages = [
        Stage(steps=2, size=16, batch_size=2, clips=4, frames=5),
        Stage(steps=1, size=32, batch_size=1, clips=2, frames=1),
    ]
    config = LoopConfig(steps=3, warmup=1, save_every=1, log_every=1)
    losses, weights = [], []
    for name, crash_at in (("whole", None), ("parts", 2)):
        out = tmp_path / name
        shutil.copytree(trained_vae, out)
        if crash_at is not None:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("vidaccel.demo.train_transformer.learning_rate", crashing_rate(crash_at))
                train_transformer(out, stages, config)
        folder = train_transformer(out, stages, config)
        losses.append([r["loss"] for r in rows(out / "transformer.jsonl")])
        weights.append(load_file(folder / "transformer/diffusion_pytorch_model.safetensors"))
    assert len(losses[0]) == 3 and losses[0] == losses[1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    untrained = build_model()["transformer"].state_dict()
    assert weights[0].keys() == untrained.keys()

    shipped = package(tmp_path / "whole", tmp_path / "shipped")
    half = load_file(shipped / "transformer/diffusion_pytorch_model.safetensors")
    assert all(v.dtype == torch.float16 for v in half.values())
    assert not any(str(tmp_path) in p.read_text() for p in shipped.rglob("*.json"))


def test_another_autoencoder_makes_other_clips_and_ends_no_training(trained_vae, tmp_path, monkeypatch):
    """The clips that the one before had encoded were taken, and a training went on in latents that meant something
    else."""
    monkeypatch.setattr("vidaccel.demo.train_vae.decoder_batch", lambda seed, step: vae_batch(seed, 100)[:1])
    shutil.copytree(trained_vae, out := tmp_path / "out")
    stages = [Stage(steps=1, size=16, batch_size=1, clips=2, frames=1)]
    config = LoopConfig(steps=1, warmup=1, save_every=1, log_every=1)
    train_transformer(out, stages, config)
    (pool,) = out.glob("pool_*")
    vae = AutoencoderKLWan.from_pretrained(out / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(out / "vae")
    (out / "transformer.ckpt").unlink()
    train_transformer(out, stages, config)
    assert list(out.glob("pool_*")) == [pool]  # the decoder makes no latents
    train_decoder(out, LoopConfig(steps=1, warmup=1, log_every=1))
    with torch.no_grad():
        vae.encoder.conv_in.weight += 0.1
    vae.save_pretrained(out / "vae")
    with pytest.raises(ValueError, match=r"transformer\.ckpt was begun on another autoencoder than that in .*vae"):
        train_transformer(out, stages, config)
    with pytest.raises(ValueError, match=r"decoder\.ckpt was begun on another autoencoder"):
        train_decoder(out, LoopConfig(steps=2, warmup=1, log_every=1))
    (out / "transformer.ckpt").unlink()
    train_transformer(out, stages, config)
    assert len(list(out.glob("pool_*"))) == 2


def test_an_error_names_a_command_that_there_is(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as told:
        train_transformer(tmp_path, [Stage(steps=1, size=16, batch_size=1, clips=1)], LoopConfig(steps=1))
    command = shlex.split(str(told.value).split("`")[1])
    assert command[:3] == ["python", "-m", "vidaccel.demo.train"]
    folders = []
    monkeypatch.setattr("vidaccel.demo.train_vae.train_vae", lambda out, config: folders.append(out))
    assert CliRunner().invoke(app, command[3:]).exit_code == 0 and folders == [tmp_path]


def crashing_rate(crash_at):
    def rate(step, config):
        if step == crash_at:
            raise KeyboardInterrupt
        return learning_rate(step, config)

    return rate


def test_the_transformer_wants_an_autoencoder_and_matching_steps(trained_vae, tmp_path):
    stage = Stage(steps=2, size=16, batch_size=1, clips=1)
    with pytest.raises(FileNotFoundError, match="train the autoencoder first"):
        train_transformer(tmp_path, [stage], LoopConfig(steps=2))
    with pytest.raises(ValueError, match="steps is 3, but the stages have 2"):
        train_transformer(trained_vae, [stage], LoopConfig(steps=3))
