"""Pools of clips that the autoencoder has encoded once, for training the transformer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import world

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKLWan


def normalise(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Whiten latents `[B, C, F, H, W]` by the channel statistics of the autoencoder, as the Wan pipelines do."""
    mean = latents.new_tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = latents.new_tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (latents - mean) / std


def encoder_hash(vae: AutoencoderKLWan) -> str:
    """Of what latents follow from: the encoder and its statistics, which a further training of the decoder leaves."""
    import torch

    digest = hashlib.sha256(repr((list(vae.config.latents_mean), list(vae.config.latents_std))).encode())
    for name, value in sorted(vae.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def check_encoder(state: Mapping[str, Any], encoder: str, checkpoint: Path) -> None:
    """Raise ValueError for a checkpoint of a training on the latents of another encoder than `encoder`, its hash."""
    if state.get("encoder", encoder) != encoder:
        raise ValueError(
            f"{checkpoint} was begun on another autoencoder than that in {checkpoint.parent / 'vae'}, of other "
            "latents: put that one back, or delete the checkpoint to begin anew"
        )


def encode_pool(
    vae: AutoencoderKLWan, path: Path, clips: int, frames: int, size: int, seed: int, bf16: bool = False, chunk: int = 8
) -> tuple[torch.Tensor, list[str]]:
    """Whitened latents float16 `[clips, C, f, h, w]` of random training scenes, and their captions.

    They are kept in files that begin with `path` and have the autoencoder in their names, of which another makes other
    latents; several processes each encode a share.
    """
    import torch

    from .parallel import rank_and_size, wait_for_all

    rank, size_of_world = rank_and_size()
    path = path.with_name(f"{path.name}_{encoder_hash(vae)}")
    parts = [path.with_name(f"{path.name}_{i}of{size_of_world}.pt") for i in range(size_of_world)]
    if not parts[rank].exists():
        latents, captions = [], []
        with torch.no_grad(), torch.autocast(vae.device.type, dtype=torch.bfloat16, enabled=bf16):
            for first in range(rank * chunk, clips, size_of_world * chunk):
                count = min(chunk, clips - first)
                videos, texts = world.training_batch(seed * 1_000_003 + first, count, frames, size, size)
                encoded = vae.encode(videos.transpose(1, 2).to(vae.device) * 2 - 1).latent_dist.mode().float()
                latents.append(normalise(vae, encoded).half().cpu())
                captions += texts
                if rank == 0 and first % (chunk * 32) == 0:
                    print(f"encoding {frames} frames of {size}x{size}: {first + count} of {clips} clips", flush=True)
        beside = parts[rank].with_suffix(".tmp")
        torch.save({"latents": torch.cat(latents), "captions": captions}, beside)
        os.replace(beside, parts[rank])
    wait_for_all()
    loaded = [torch.load(part, weights_only=True) for part in parts]
    return torch.cat([p["latents"] for p in loaded]), [text for p in loaded for text in p["captions"]]
