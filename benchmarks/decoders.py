"""How long tiny decoders take beside the autoencoders whose latents they decode, at published sizes.

    python benchmarks/decoders.py                                                        # a CPU, some minutes
    python benchmarks/decoders.py --device cuda --dtype bfloat16 --frames 81 --height 480 --width 832 --out gpu

Weights are random, which times do not depend on: what the frames look like is not measured here. Each autoencoder has
the published configuration, each tiny decoder the layout of the one that TAEHV publishes for it. Results go to
`decoders.md` and `decoders.json`.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from common import RESULTS, environment_line, write_markdown

WAN_5B = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "is_residual": True,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
# As its checkpoints state: what diffusers computes without that is twice as much.
LTX_2 = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}
# Name -> class of diffusers, its configuration where that is not the default, and of the tiny decoder likewise.
AUTOENCODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Wan 2.1": ("AutoencoderKLWan", {}, {}),
    "Wan 2.2 5B": ("AutoencoderKLWan", WAN_5B, {"patch_size": 2}),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", {}, {}),
    "HunyuanVideo 1.5": ("AutoencoderKLHunyuanVideo15", {}, {"patch_size": 2}),
    "CogVideoX": ("AutoencoderKLCogVideoX", {}, {}),
    "LTX-2": ("AutoencoderKLLTX2Video", LTX_2, {"patch_size": 4, "time_growth": (2, 2, 2)}),
}


def decode_seconds(decode: Callable[[], Any], rounds: int, device: Any) -> tuple[float, float]:
    """Median seconds after one that is not counted, and on a GPU the most memory in GiB, 0 elsewhere."""
    import torch

    from vidaccel.generation.machine import synchronise

    on_gpu = device.type == "cuda"
    decode()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        decode()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0


def measure(name: str, frames: int, height: int, width: int, rounds: int, device: Any, dtype: Any) -> dict[str, Any]:
    """The row of an autoencoder."""
    import diffusers
    import torch

    from vidaccel.autoencoders.tiny import TinyVideoDecoder, channels_of, compression_of

    cls, config, shape = AUTOENCODERS[name]
    vae = getattr(diffusers, cls)(**config).to(device, dtype).eval().requires_grad_(False)
    time_factor, space = compression_of(vae)
    latent_frames = (frames - 1) // time_factor + 1
    tiny = TinyVideoDecoder(channels_of(vae), **shape, autoencoder=cls)
    torch.nn.Module.to(tiny, device, dtype).eval().requires_grad_(False)
    latents = torch.randn(1, channels_of(vae), latent_frames, height // space, width // space)
    latents = latents.to(device, dtype)
    with torch.inference_mode():
        own, own_memory = decode_seconds(lambda: vae.decode(latents), rounds, device)
        small, tiny_memory = decode_seconds(lambda: tiny(latents), rounds, device)
    row = {
        "latents of": name,
        "video": f"{tiny.frames_of(latent_frames)} x {height // space * space} x {width // space * space}",
        "autoencoder, s": round(own, 3),
        "tiny decoder, s": round(small, 3),
        "times as fast": f"{own / small:.0f}",
    }
    if device.type == "cuda":
        row |= {"autoencoder, GiB": round(own_memory, 2), "tiny decoder, GiB": round(tiny_memory, 2)}
    return row


def main(
    device: str = "cpu",
    dtype: str = "float32",
    frames: int = 9,
    height: int = 256,
    width: int = 256,
    rounds: int = 1,
    only: str = "",
    out: Path = RESULTS,
) -> None:
    """Measure the autoencoders whose name begins with `--only`."""
    import torch

    place = torch.device(device)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in (name for name in AUTOENCODERS if name.startswith(only)):
        rows.append(measure(name, frames, height, width, rounds, place, getattr(torch, dtype)))
        print(rows[-1], flush=True)
        gc.collect()
        write(rows, out, f"{environment_line(device)}, {dtype}", rounds)


def write(rows: list[dict[str, Any]], out: Path, made_on: str, rounds: int) -> None:
    """The tables, after each row."""
    write_markdown(
        out / "decoders.md",
        "Tiny decoders beside their autoencoders",
        f"{made_on}. Made by `benchmarks/decoders.py`, in one process.\n\nSeconds to decode a video (frames x height "
        f"x width), median of {rounds} after one that is not counted, with random weights of published sizes: times do "
        "not depend on them. Autoencoders as diffusers has them, without tiles. How the frames look is not measured.",
        rows,
    )
    (out / "decoders.json").write_text(json.dumps({"made_on": made_on, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
