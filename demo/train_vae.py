"""Training of the demo autoencoder: L1 and squared error of pixels, L1 of their gradients, and a small KL term."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import modeling, world
from .optimizer import MuonWithAdamW
from .pool import check_encoder, encoder_hash
from .training import Average, Log, LoopConfig, learning_rate, load_checkpoint, save_checkpoint, step_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from diffusers import AutoencoderKLWan

KL_WEIGHT = 2e-4
EDGE_WEIGHT = 0.5
STATISTICS_CLIPS = 96


def vae_batch(seed: int, step: int) -> torch.Tensor:
    """Clips in [-1, 1], `[B, 3, F, H, W]`, of training scenes.

    First many tiny ones, from which colours are learned quickly: 64 images of 32x32 pixels up to step 100, then 32
    clips of 5 frames up to step 250. Then 8 clips of 9 frames at 64x64, and every sixth step one whole clip of 33
    frames at 128x128, for the cache of the convolutions. Half of the small clips are zoomed in twice, so that
    outlines are as long as at full size.
    """
    import torch

    rng = random.Random(seed)
    if step < 100:
        count, frames, size = 64, 1, 32
    elif step < 250:
        count, frames, size = 32, 5, 32
    elif step % 6 == 5:
        return world.render(world.sample_scene(rng)).transpose(0, 1)[None] * 2 - 1
    else:
        count, frames, size = 8, 9, 64
    clips = []
    for _ in range(count):
        scene = world.sample_scene(rng)
        zoom = rng.choice((1, 2))
        window = max(frames - 1, 1) / 32 * zoom * scene.travel
        start = (rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9))
        scene = replace(scene, size=scene.size * zoom, travel=window, start=start)
        clips.append(world.render(scene, frames, size, size).transpose(0, 1))
    return torch.stack(clips) * 2 - 1


def decode_unclamped(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`AutoencoderKLWan.decode` without its clamp to [-1, 1], which would stop the gradient of every overshoot."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        kwargs = {"first_chunk": True} if i == 0 else {}
        chunks.append(vae.decoder(hidden[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **kwargs))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), vae.config.patch_size)


def vae_loss(
    vae: AutoencoderKLWan, clips: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, mean squared error in [0, 1] units, KL in nats per latent value)."""
    import torch

    posterior = vae.encode(clips).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    decoded = decode_unclamped(vae, mean + noise * (0.5 * logvar).exp()).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    error = decoded - clips
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    loss = error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl
    return loss, (error.detach() / 2).square().mean(), kl.detach()


def decoder_batch(seed: int, step: int) -> torch.Tensor:
    """Whole clips of 33 frames, `[B, 3, F, H, W]` in [-1, 1]: two of 64x64 pixels, every fourth step one of 128x128."""
    count, size = (1, 128) if step % 4 == 3 else (2, 64)
    return world.training_batch(seed, count, world.FRAMES, size, size)[0].transpose(1, 2) * 2 - 1


def train_vae(out: Path, config: LoopConfig) -> Path:
    """Train, or continue, and write `out/vae` (a diffusers folder) with the latent statistics in its config.

    Returns:
        The folder.
    """
    import torch

    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    vae = modeling.build_vae().to(config.device)
    average = _loop(out, "vae", vae, vae_batch, config)
    vae.load_state_dict(average.weights)
    return export_vae(vae, out)


def train_decoder(out: Path, config: LoopConfig) -> Path:
    """Train on only the decoder of `out/vae`, on whole clips, and write it back; the latents stay as they are.

    The short clips of `train_vae` teach little about frames far from the first; this mends it after, or while, the
    transformer trains.

    Raises:
        FileNotFoundError: without `out/vae`.
        ValueError: a checkpoint is of a training on another autoencoder.
    """
    from diffusers import AutoencoderKLWan

    if not (out / "vae").is_dir():
        raise FileNotFoundError(
            f"{out / 'vae'} does not exist: train the autoencoder first (`python -m vidaccel.demo.train vae {out}`)"
        )
    vae = AutoencoderKLWan.from_pretrained(out / "vae").to(config.device)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    average = _loop(out, "decoder", vae, decoder_batch, config, encoder_hash(vae))
    vae.load_state_dict(average.weights)
    vae.save_pretrained(out / "vae", safe_serialization=True)
    return out / "vae"


def _loop(
    out: Path,
    name: str,
    vae: AutoencoderKLWan,
    draw: Callable[[int, int], torch.Tensor],
    config: LoopConfig,
    encoder: str | None = None,
) -> Average:
    """Run or continue the loop called `name`; returns the averaged weights.

    `encoder` is the hash of the one that stays as it is: a checkpoint would bring back that of its own training.
    """
    import torch

    trained = ((key, p) for key, p in vae.named_parameters() if p.requires_grad)
    optimizer = MuonWithAdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    average = Average(vae, config.ema_decay)
    checkpoint, first, seconds = out / f"{name}.ckpt", 0, 0.0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, vae, average, optimizer)
        if encoder is not None:
            check_encoder(state, encoder, checkpoint)
        first, seconds = state["step"], state["seconds"]
    log = Log(out / f"{name}.jsonl")
    begin = time.perf_counter() - seconds
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        seed = step_seed(config.seed, step)
        clips = draw(seed, step).to(config.device)
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.bf16):
            loss, mse, kl = vae_loss(vae, clips, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), config.clip)
        optimizer.step()
        average.update(vae, step)
        if step % config.log_every == 0 or step == config.steps - 1:
            log.write(
                step=step,
                loss=loss.item(),
                psnr=-10 * mse.log10().item(),
                kl=kl.item(),
                grad_norm=norm.item(),
                lr=learning_rate(step, config),
                seconds=time.perf_counter() - begin,
            )
        if (step + 1) % config.save_every == 0 or step == config.steps - 1:
            spent = time.perf_counter() - begin
            save_checkpoint(checkpoint, vae, average, optimizer, step + 1, seconds=spent, encoder=encoder)
    return average


def export_vae(vae: AutoencoderKLWan, out: Path) -> Path:
    """Write `out/vae`, with mean and standard deviation of the latents over random clips in the config."""
    import torch

    vae.eval()
    sums = torch.zeros(2, modeling.LATENT_CHANNELS, dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for i in range(STATISTICS_CLIPS):
            size = 128 if i % 3 == 2 else 64
            clip, _ = world.training_batch(10_000_000 + i, 1, world.FRAMES, size, size)
            latents = vae.encode(clip.transpose(1, 2).to(vae.device) * 2 - 1).latent_dist.mode().double().cpu()
            values = latents.transpose(0, 1).flatten(1)
            sums += torch.stack([values.mean(1), values.square().mean(1)])
            count += 1
    mean, square = sums / count
    vae.register_to_config(
        latents_mean=[round(v, 6) for v in mean.tolist()],
        latents_std=[round(v, 6) for v in (square - mean.square()).sqrt().tolist()],
    )
    vae.save_pretrained(out / "vae", safe_serialization=True)
    return out / "vae"
