"""A denoising step and decoding of Wan at true sizes, in its own latent space and in DC-AE-V's, with random weights.

    python benchmarks/dc_videogen.py --model wan-1.3b                       # 480p to 2160p, on a GPU, in bfloat16
    python benchmarks/dc_videogen.py --model wan-14b --sizes 720p --budget-seconds 500
    python benchmarks/dc_videogen.py --model tiny --sizes tiny --device cpu

Random weights are as fast as trained ones. One size after another, smallest first, until the time is up; what does not
fit into memory says so in its row. Frames are 81 for Wan and 80 for DC. The time of a video is computed, not measured:
steps x 2 guidance branches x a step, and decoding. Results go to `benchmarks/results/dc_videogen-*`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import typer
from common import RESULTS, environment_line, write_csv, write_markdown

# What differs from `WanTransformer3DModel`'s defaults, which are those of Wan 2.1 14B.
MODELS = {
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2, "text_dim": 64},
    "wan-1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan-14b": {},
}
SIZES = {
    "tiny": (64, 64),
    "480p": (480, 832),
    "720p": (720, 1280),
    "1080p": (1080, 1920),
    "2160p": (2160, 3840),
}
TINY_DC = {"latent_channels": 8, "block_out_channels": (8, 8, 16, 16, 16, 16, 16), "layers_per_block": (0,) + (1,) * 6}
STEPS = 50


def transformer(model: str, deep: bool, channels: int, device, dtype):
    """A Wan transformer with random weights, for Wan's latents or for a deep-compression autoencoder's."""
    import torch
    from diffusers import WanTransformer3DModel

    changes = dict(MODELS[model])
    if deep:
        changes |= {"patch_size": (1, 1, 1), "in_channels": channels, "out_channels": channels}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return WanTransformer3DModel(**changes, rope_max_seq_len=2048).eval()
    finally:
        torch.set_default_dtype(before)


def autoencoder(model: str, deep: bool, device, dtype):
    """Wan's autoencoder, or DC-AE-V f32t4c32, with random weights; small ones for the tiny model."""
    import torch
    from diffusers import AutoencoderKLWan

    from vidaccel import AutoencoderDCV

    with torch.device(device):
        if deep:
            made = AutoencoderDCV(**TINY_DC) if model == "tiny" else AutoencoderDCV.from_preset("f32t4c32")
        else:
            made = AutoencoderKLWan(base_dim=8) if model == "tiny" else AutoencoderKLWan()
    return made.to(dtype).eval()


def timed(function, repeats: int, device) -> tuple[float, float | None]:
    """Median seconds after a warm-up, and peak memory in GB (None on a CPU)."""
    import torch

    cuda = device.type == "cuda"
    seconds = []
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(repeats + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            function()
        if cuda:
            torch.cuda.synchronize(device)
        if number:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), torch.cuda.max_memory_allocated(device) / 1e9 if cuda else None


def attempt(function, repeats: int, device) -> tuple[float | None, float | None]:
    """`timed`, or nothing where memory does not suffice."""
    import torch

    try:
        return timed(function, repeats, device)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, None


def _step(network, latents, repeats: int) -> tuple[float | None, float | None]:
    import torch

    text = torch.randn(1, 512, network.config.text_dim, device=latents.device, dtype=latents.dtype)
    timestep = torch.tensor([900.0], device=latents.device)
    return attempt(lambda: network(latents, timestep, text, return_dict=False), repeats, latents.device)


def measure(model: str, size: str, deep: bool, repeats: int, device, dtype) -> dict[str, object]:
    """One row: a step and decoding at one size."""
    import torch

    from vidaccel.pipelines.deep_compression.canvas import Canvas

    height, width = SIZES[size]
    frames, spatial, patch = (80, 32, (1, 1, 1)) if deep else (81, 8, (1, 2, 2))
    pad = 0 if deep else 3  # Wan's first latent frame stands for one frame
    if size == "tiny":
        frames = 8 + (not deep)
    canvas = Canvas.for_video(frames, height, width, patch=patch, spatial=spatial, temporal=4, pad_frames=pad)
    grid = (canvas.latent_frames, canvas.height // spatial, canvas.width // spatial)
    vae = autoencoder(model, deep, "meta", dtype)
    channels = vae.config.z_dim
    latents = torch.randn(1, channels, *grid, device=device, dtype=dtype)
    step, step_memory = _step(transformer(model, deep, channels, device, dtype), latents, repeats)
    vae = autoencoder(model, deep, device, dtype)
    if height > 720:
        vae.enable_tiling()
    decode, decode_memory = attempt(lambda: vae.decode(latents, return_dict=False), 1, device)
    whole = None if None in (step, decode) else (2 * STEPS * step + decode) / 60
    tokens = grid[0] * (grid[1] // patch[1]) * (grid[2] // patch[2])
    row = {"model": model, "latents": "DC-AE-V f32t4c32" if deep else "Wan", "size": size, "frames": frames}
    row |= {"tokens": tokens, "step_ms": step and round(1000 * step, 2), "decode_s": decode and round(decode, 3)}
    row |= {"tiled": vae.use_tiling, "video_minutes": whole and round(whole, 3)}
    if device.type == "cuda":
        row |= {
            "step_gb": step_memory and round(step_memory, 1),
            "decode_gb": decode_memory and round(decode_memory, 1),
        }
    return row


def with_ratios(rows: list[dict]) -> list[dict]:
    """The rows with how many times faster DC is than Wan at the same size."""
    base = {row["size"]: row for row in rows if row["latents"] == "Wan"}
    for row in rows:
        before = base.get(row["size"])
        for name, key in (("step_ratio", "step_ms"), ("video_ratio", "video_minutes")):
            known = before and before[key] and row[key]
            row[name] = round(before[key] / row[key], 2) if known and row is not before else ""
    return [{key: "out of memory" if value is None else value for key, value in row.items()} for row in rows]


def main(
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "wan-1.3b",
    sizes: Annotated[
        str, typer.Option(help="Separated by commas: 480p, 720p, 1080p, 2160p.")
    ] = "480p,720p,1080p,2160p",
    repeats: Annotated[int, typer.Option(help="Timed steps of each.")] = 5,
    budget_seconds: Annotated[float, typer.Option(help="No further size begins after this.")] = 3000,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, and write a table as CSV and Markdown."""
    import torch

    chosen = sizes.split(",")
    unknown = [size for size in chosen if size not in SIZES]
    if model not in MODELS or unknown:
        raise typer.BadParameter(f"known models: {', '.join(MODELS)}; known sizes: {', '.join(SIZES)}")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device: give --device cpu --model tiny --sizes tiny")
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    start, rows = time.monotonic(), []
    for size in chosen:
        for deep in (True, False):
            if time.monotonic() - start > budget_seconds:
                break
            rows.append(measure(model, size, deep, repeats, place, dtype))
            print(rows[-1], flush=True)
    rows = with_ratios(rows)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"dc_videogen-{model}-{place.type}"
    write_csv(stem.with_suffix(".csv"), rows)
    text = f"{environment_line(device)}, {dtype}. Random weights; a video is {STEPS} steps with guidance."
    write_markdown(stem.with_suffix(".md"), f"DC-VideoGen against Wan, {model}", text, rows)


if __name__ == "__main__":
    typer.run(main)
