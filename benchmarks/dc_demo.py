"""The built-in DC-VideoGen model against the one it was made from: reconstruction, speed, and accuracy of prompts.

    python benchmarks/dc_demo.py --also "aligned=RUN/adapter" --also "not aligned=RUN_WITHOUT_ALIGNMENT/adapter"

Reconstruction compares the two autoencoders on scenes that neither has seen, also with latents rounded to few bits, so
that both can be read at equal sizes. Speed runs both models in turns in one process. Accuracy reads 64 videos, of
prompts that training never saw, from their pixels. Results go to `benchmarks/results/dc_demo*`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from common import RESULTS, environment_line, write_markdown

BITS = [16, 8, 6, 4, 3, 2]
FRAMES = {"demo": 33, "demo-dc": 32}


def load(location: Path | str, autoencoder: Path | None = None):
    """A DC-VideoGen pipeline in float32, without progress bars."""
    import torch

    import vidaccel

    options = {"autoencoder": autoencoder} if autoencoder else {}
    pipe = vidaccel.DCVideoGenPipeline.from_pretrained(location, dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rounded(latents, bits: int):
    """Latents `[B, C, T, H, W]` in `bits` each: uniform steps over four standard deviations of each channel."""
    if bits >= 16:
        return latents.half().float()
    mean = latents.mean(dim=(0, 2, 3, 4), keepdim=True)
    reach = 4 * latents.std(dim=(0, 2, 3, 4), keepdim=True)
    step = 2 * reach / (2**bits - 1)
    steps = ((latents - mean + reach) / step).round().clamp(0, 2**bits - 1)
    return steps * step - reach + mean


def reconstruction(pipes: dict, clips: int, bits_a_value: Sequence[int], size: int) -> list[dict]:
    """PSNR and SSIM of both autoencoders at several bits a latent value."""
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    from vidaccel.demo import world

    rows = []
    for name, pipe in pipes.items():
        scenes = [world.sample_scene(50_000_000 + i) for i in range(clips)]
        videos = [world.render(scene, FRAMES[name], size, size).transpose(0, 1)[None] for scene in scenes]
        with torch.inference_mode():
            encoded = [pipe.vae.encode(video * 2 - 1) for video in videos]
        latents = torch.cat([e.latent if hasattr(e, "latent") else e.latent_dist.mode() for e in encoded])
        values = latents[0].numel()
        for bits in bits_a_value:
            psnr, ssim = [], []
            for video, latent in zip(videos, rounded(latents, bits).split(1), strict=True):
                with torch.inference_mode():
                    made = pipe.vae.decode(latent).sample.clamp(-1, 1) / 2 + 0.5
                frames, wanted = made[0].transpose(0, 1), video[0].transpose(0, 1)
                psnr.append(float(peak_signal_noise_ratio(frames, wanted, data_range=1.0)))
                ssim.append(float(structural_similarity_index_measure(frames, wanted, data_range=1.0)))
            rows.append(
                {
                    "autoencoder": name,
                    "latent values a clip": values,
                    "bits a value": bits,
                    "kilobit a second": round(values * bits * 16 / FRAMES[name] / 1000, 1),
                    "PSNR (dB)": f"{statistics.mean(psnr):.2f} ± {statistics.stdev(psnr):.2f}",
                    "lowest": f"{min(psnr):.2f}",
                    "SSIM": f"{statistics.mean(ssim):.4f}",
                }
            )
            print(rows[-1], flush=True)
    return rows


def speed(pipes: dict, rounds: int, steps: int, size: int) -> list[dict]:
    """Seconds a step and of decoding, the models in turns: median, lowest and highest of runs of half the steps."""
    from vidaccel.demo import modeling
    from vidaccel.generation.models.inspected import inspect_model
    from vidaccel.generation.requests.settings import Settings
    from vidaccel.generation.run import make_video

    measured: dict[str, list] = {name: [] for name in pipes}
    settings = {
        name: Settings(
            "a green triangle moves right on a grey background",
            frames=FRAMES[name],
            height=size,
            width=size,
            steps=steps // 2,
            guidance_scale=modeling.GUIDANCE_SCALE,
        )
        for name in pipes
    }
    for number in range(rounds + 1):
        for name, pipe in pipes.items():
            video = make_video(pipe, settings[name], name, None)
            if number:  # the first is a warm-up
                measured[name].append(video)
    rows = []
    for name, videos in measured.items():
        each = sorted(1000 * video.step_seconds for video in videos)
        whole = [2 * (video.seconds - video.decode_seconds) + video.decode_seconds for video in videos]
        facts = inspect_model(name)
        rows.append(
            {
                "model": name,
                "frames": FRAMES[name],
                "tokens": facts.layout(FRAMES[name], size, size).tokens,
                "ms a step": f"{statistics.median(each):.1f} ({each[0]:.1f} to {each[-1]:.1f})",
                "s decoding": f"{statistics.median(video.decode_seconds for video in videos):.2f}",
                f"s a video of {steps} steps": f"{statistics.median(whole):.2f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def accuracy(pipes: dict, seed_offset: int, prompts: int, steps: int, size: int) -> tuple[list[dict], dict]:
    """Share of the held-out prompts that the videos show, and the videos."""
    from vidaccel.demo import HELD_OUT_PROMPTS
    from vidaccel.demo.evaluate import evaluate

    rows, videos = [], {}
    picks = tuple(HELD_OUT_PROMPTS[i * len(HELD_OUT_PROMPTS) // prompts] for i in range(prompts))
    for name, pipe in pipes.items():
        print(name, flush=True)
        frames = FRAMES.get(name, FRAMES["demo-dc"])
        result, videos[name] = evaluate(pipe, picks, 8, seed_offset, frames=frames, size=size, steps=steps)
        shares = {attribute: f"{100 * value:.0f} %" for attribute, value in result["accuracy"].items()}
        rows.append({"model": name, "prompts": prompts, **shares})
    return rows, videos


def write_sheet(videos: dict, path: Path) -> None:
    """The same six prompts from every model, one above the other."""
    import imageio.v3 as imageio
    import torch

    from vidaccel.demo.evaluate import contact_sheet

    count = len(next(iter(videos.values())))
    picks = [i * count // 6 for i in range(min(6, count))]
    sheets = [contact_sheet([made[i] for i in picks]) for made in videos.values()]
    gap = torch.full((16, sheets[0].shape[1], 3), 255, dtype=torch.uint8)
    imageio.imwrite(path, torch.cat([part for sheet in sheets for part in (sheet, gap)][:-1]).numpy(), quality=88)


def main(
    also: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of another adapter whose accuracy is measured; repeatable.")
    ] = None,
    autoencoder: Annotated[Path | None, typer.Option(help="Their autoencoder, where it is not where it was.")] = None,
    clips: Annotated[int, typer.Option(help="Scenes for reconstruction.")] = 32,
    bits: Annotated[list[int], typer.Option(help="Of a latent value, for reconstruction; repeatable.")] = BITS,
    rounds: Annotated[int, typer.Option(help="Timed runs of each model.")] = 7,
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 64,
    steps: Annotated[int, typer.Option(min=4, help="Of a video.")] = 20,
    size: Annotated[int, typer.Option(min=64, help="Pixels of a side; the models were trained at 128.")] = 128,
    seed_offset: Annotated[int, typer.Option(help="Added to the seeds of the prompts.")] = 2000,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, and write dc_demo.md, dc_demo.json and dc_demo.jpg."""
    import torch
    from diffusers import WanPipeline

    from vidaccel import demo

    others = {}
    for text in also or ():
        name, equals, folder = text.partition("=")
        if not equals:
            raise typer.BadParameter(f'--also {text}: write it as "NAME=FOLDER".')
        others[name] = load(folder, autoencoder)
    base = WanPipeline.from_pretrained(demo.path())
    base.set_progress_bar_config(disable=True)
    pipes = {"demo": base, "demo-dc": load(demo.path(demo.DC))}
    start = time.perf_counter()
    tables = {"speed": speed(pipes, rounds, steps, size), "reconstruction": reconstruction(pipes, clips, bits, size)}
    pipes |= others
    tables["accuracy"], videos = accuracy(pipes, seed_offset, prompts, steps, size)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"environment": environment_line(), "threads": torch.get_num_threads(), "seed_offset": seed_offset}
    facts["seconds"] = round(time.perf_counter() - start)
    (out / "dc_demo.json").write_text(json.dumps({**facts, **tables}, indent=1) + "\n")
    write_sheet(videos, out / "dc_demo.jpg")
    text = (
        f"{facts['environment']}. {size}x{size} pixels; {clips} scenes for reconstruction, {rounds} timed runs of "
        f"each model in turns (median, lowest to highest), {prompts} held-out prompts with seeds from {seed_offset}, "
        f"{steps} steps, guidance 2. `dc_demo.jpg` shows six of the prompts from each model, in the order of the "
        "last table."
    )
    write_markdown(out / "dc_demo.md", "The built-in DC-VideoGen model", text, *tables.values())


if __name__ == "__main__":
    typer.run(main)
