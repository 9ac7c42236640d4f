"""Training of the demo transformer and its text encoder by flow matching, first small, then at full size."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import modeling, world
from .optimizer import MuonWithAdamW
from .parallel import average_gradients, rank_and_size, start
from .pool import check_encoder, encode_pool, encoder_hash
from .text import encode_text, ignore_padding_at_first, use_padded_cross_attention
from .tokenizer import build_tokenizer, vocabulary
from .training import Average, Log, LoopConfig, learning_rate, load_checkpoint, save_checkpoint, step_seed

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLWan
    from torch import nn
    from transformers import PreTrainedTokenizerBase

CAPTION_TOKENS = 10
"""Nine words and the end mark."""
CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class Stage:
    """A part of training at one size.

    Args:
        steps: how many optimiser steps it lasts.
        size: pixels of the square frame; the number of frames is always 33 (`world.FRAMES`) unless given.
        batch_size: clips a step.
        clips: clips in the pool that steps draw from.
        focus: share of the noise levels drawn where outlines form, see `sample_sigmas`.
        object_weight: how much more the object counts than the background, see `object_weights`.
    """

    steps: int
    size: int
    batch_size: int
    clips: int
    frames: int = world.FRAMES
    focus: float = 0.0
    object_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.size % 16:
            raise ValueError(f"size is {self.size}, but must be a multiple of 16 (8x autoencoder, patches of 2)")
        if min(self.batch_size, self.clips) < 1 or self.steps < 0:
            raise ValueError(
                f"steps, batch_size and clips are {self.steps}, {self.batch_size}, {self.clips}: too small"
            )


def sample_sigmas(
    count: int, generator: torch.Generator, focus: float = 0.0, shift: float = modeling.FLOW_SHIFT
) -> torch.Tensor:
    """Noise levels `[count]` in (0, 1), stratified, with the density that the scheduler's shifted grid has.

    A share `focus` of them follows a logit-normal density instead (mean 0.9, deviation 0.9), where outlines form.
    """
    import torch

    def strata(number: int) -> torch.Tensor:
        return (torch.arange(number) + torch.rand(number, generator=generator)) / max(number, 1)

    focused = round(focus * count)
    uniform = strata(count - focused)
    normal = torch.special.ndtri(strata(focused).clamp(1e-4, 1 - 1e-4))
    sigma = torch.cat([shift * uniform / (1 + (shift - 1) * uniform), torch.sigmoid(0.9 + 0.9 * normal)])
    return sigma[torch.randperm(count, generator=generator)]


def object_weights(latents: torch.Tensor, weight: float) -> torch.Tensor:
    """Loss weights `[B, 1, F, H, W]` of mean 1: cells in and beside the object count `weight` times as much as others.

    The object is where clean latents `[B, C, F, H, W]` differ from those of the corners. As the minimiser of a squared
    error is the same under any weights of places, this only spends less of the gradient on the plain background.
    """
    import torch.nn.functional as functional

    ends = [0, -1]  # the same one of a single row or column
    corners = latents[..., ends, :][..., ends].mean(dim=(3, 4), keepdim=True)
    distance = (latents - corners).norm(dim=1, keepdim=True)
    inside = (distance > 0.5 * distance.amax(dim=(2, 3, 4), keepdim=True)).float()
    near = functional.max_pool3d(inside, (1, 3, 3), stride=1, padding=(0, 1, 1))
    weights = 1 + (weight - 1) * near
    return weights / weights.mean(dim=(2, 3, 4), keepdim=True)


def flow_loss(
    model: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerBase,
    latents: torch.Tensor,
    captions: list[str],
    generator: torch.Generator,
    bf16: bool,
    focus: float = 0.0,
    object_weight: float = 1.0,
    share: slice = slice(None),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared error of the velocity of each clip, `[B]`, weighted and plain, and the noise levels.

    The target is noise - latents.

    `share` picks the clips that this process computes; noise and levels are drawn for the whole batch.
    """
    import torch

    device = latents.device
    count = latents.shape[0]
    noise = torch.randn(latents.shape, generator=generator).to(device)
    sigma = sample_sigmas(count, generator, focus).to(device)
    weight = sigma.view(-1, 1, 1, 1, 1)
    dropped = (torch.rand(count, generator=generator) < CAPTION_DROPOUT).tolist()
    prompts = ["" if drop else text for drop, text in zip(dropped, captions, strict=True)]
    latents, noise, sigma, weight = (x[share] for x in (latents, noise, sigma, weight))
    prompts = prompts[share]
    states = encode_text(model["text_encoder"], tokenizer, prompts, CAPTION_TOKENS)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        velocity = model["transformer"](
            hidden_states=(1 - weight) * latents + weight * noise,
            timestep=sigma * 1000,
            encoder_hidden_states=states,
            return_dict=False,
        )[0]
    error = (velocity.float() - (noise - latents)).square()
    plain = error.detach().mean(dim=(1, 2, 3, 4))
    if object_weight != 1.0:
        error = error * object_weights(latents, object_weight)
    return error.mean(dim=(1, 2, 3, 4)), plain, sigma


def build_model() -> nn.ModuleDict:
    """The two parts that are trained together, untrained."""
    import torch

    return torch.nn.ModuleDict(
        {
            "transformer": modeling.build_transformer(),
            "text_encoder": modeling.build_text_encoder(len(vocabulary())),
        }
    )


def train_transformer(out: Path, stages: list[Stage], config: LoopConfig) -> Path:
    """Train, or continue, on the autoencoder in `out/vae`; write `out/pipeline`, a folder for `WanPipeline`.

    `config.steps` must be the sum over the stages.

    Returns:
        The pipeline's folder.

    Raises:
        FileNotFoundError: without `out/vae`.
        ValueError: when the steps disagree, or a checkpoint is of a training on another autoencoder.
    """
    import torch
    from diffusers import AutoencoderKLWan

    if not (out / "vae").is_dir():
        raise FileNotFoundError(
            f"{out / 'vae'} does not exist: train the autoencoder first (`python -m vidaccel.demo.train vae {out}`)"
        )
    if config.steps != sum(s.steps for s in stages):
        raise ValueError(
            f"steps is {config.steps}, but the stages have {sum(s.steps for s in stages)}: make them equal"
        )
    start()
    rank, size = rank_and_size()
    torch.manual_seed(config.seed)
    vae = AutoencoderKLWan.from_pretrained(out / "vae").to(config.device).eval()
    encoder = encoder_hash(vae)
    tokenizer = build_tokenizer()
    model = build_model().to(config.device)
    ignore_padding_at_first(model["transformer"])
    use_padded_cross_attention(model["transformer"])
    optimizer = MuonWithAdamW(model.named_parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    average = Average(model, config.ema_decay)
    checkpoint, first, seconds = out / "transformer.ckpt", 0, 0.0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, model, average, optimizer)
        check_encoder(state, encoder, checkpoint)
        first, seconds = state["step"], state["seconds"]
    log = Log(out / "transformer.jsonl")
    begin = time.perf_counter() - seconds
    step, end = first, 0
    for number, stage in enumerate(stages):
        end += stage.steps
        if step >= end:
            continue
        name = f"pool_{stage.frames}x{stage.size}_{stage.clips}_{config.seed}"
        latents, captions = encode_pool(
            vae, out / name, stage.clips, stage.frames, stage.size, config.seed + 1 + number, config.bf16
        )
        total = []
        while step < end:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            seed = step_seed(config.seed, step)
            generator = torch.Generator().manual_seed(seed)
            picks = random.Random(seed).choices(range(stage.clips), k=stage.batch_size)
            batch = latents[picks].float().to(config.device)
            share = slice(rank, None, size)
            loss, plain, sigma = flow_loss(
                model,
                tokenizer,
                batch,
                [captions[i] for i in picks],
                generator,
                config.bf16,
                stage.focus,
                stage.object_weight,
                share,
            )
            optimizer.zero_grad(set_to_none=True)
            loss.mean().backward()
            average_gradients(model)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            average.update(model, step)
            total.append(plain.mean().item())
            if rank == 0 and ((step + 1) % config.log_every == 0 or step == config.steps - 1):
                high = plain[sigma > 0.8]
                log.write(
                    step=step,
                    stage=number,
                    loss=sum(total) / len(total),
                    loss_high_noise=high.mean().item() if len(high) else None,
                    grad_norm=norm.item(),
                    lr=learning_rate(step, config),
                    seconds=time.perf_counter() - begin,
                )
                total = []
            step += 1
            if rank == 0 and (step % config.save_every == 0 or step == config.steps):
                spent = time.perf_counter() - begin
                save_checkpoint(checkpoint, model, average, optimizer, step, seconds=spent, encoder=encoder)
                export_pipeline(vae, average, out / "pipeline")
    return out / "pipeline"


def export_pipeline(vae: AutoencoderKLWan, average: Average, folder: Path) -> Path:
    """Write the averaged weights as a `WanPipeline` folder in float32."""
    from diffusers import WanPipeline

    model = build_model()
    model.load_state_dict(average.weights)
    model.eval()
    pipe = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=model["text_encoder"],
        transformer=model["transformer"],
        vae=vae,
        scheduler=modeling.build_scheduler(),
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def package(out: Path, folder: Path) -> Path:
    """Write `out/pipeline`, with the autoencoder of `out/vae`, to `folder` for shipping: half the size.

    Transformer and autoencoder are stored in float16, which diffusers loads as float32 unless told otherwise. The
    text encoder stays float32: transformers would keep float16, and it is small.
    """
    from diffusers import AutoencoderKLWan, WanPipeline

    pipe = WanPipeline.from_pretrained(out / "pipeline", vae=AutoencoderKLWan.from_pretrained(out / "vae"))
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(folder, safe_serialization=True)
    for path in folder.rglob("*.json"):  # diffusers and transformers record where the parts were loaded from
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2) + "\n")
    return folder
