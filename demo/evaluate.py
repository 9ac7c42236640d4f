"""Accuracy of a demo model on the held-out prompts: `python -m vidaccel.demo.evaluate --out results.json`.

Every prompt is sampled once through the stock `WanPipeline`, with its place in the list as seed, and read by `checker`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import HELD_OUT_PROMPTS, modeling, path, world
from .checker import check

if TYPE_CHECKING:
    import torch
    from diffusers import WanPipeline

ATTRIBUTES = ("shape", "colour", "motion", "background", "all")


def sample(
    pipe: WanPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int = modeling.STEPS,
    guidance_scale: float = modeling.GUIDANCE_SCALE,
    frames: int = world.FRAMES,
    size: int = world.HEIGHT,
) -> torch.Tensor:
    """Videos `[B, F, 3, H, W]` in [0, 1], each from its own seed."""
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        prompts,
        num_frames=frames,
        height=size,
        width=size,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=generators,
        output_type="pt",
    ).frames


def evaluate(
    pipe: WanPipeline,
    prompts: tuple[str, ...] = HELD_OUT_PROMPTS,
    batch_size: int = 8,
    seed_offset: int = 0,
    **sampling,
) -> tuple[dict, list[torch.Tensor]]:
    """Accuracy per attribute and what each video shows, and the videos; `sampling` goes to `sample`.

    The seed of a held-out prompt is its place in `HELD_OUT_PROMPTS`; that of another one is its place in `prompts`;
    `seed_offset` is added to all.
    """
    rows: list[dict[str, Any]] = []
    videos = []
    begin = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch = list(prompts[first : first + batch_size])
        seeds = [HELD_OUT_PROMPTS.index(p) if p in HELD_OUT_PROMPTS else first + i for i, p in enumerate(batch)]
        seeds = [seed + seed_offset for seed in seeds]
        for prompt, video in zip(batch, sample(pipe, batch, seeds, **sampling), strict=True):
            reading = check(video)
            right = reading.agrees_with(prompt)
            rows.append({"prompt": prompt, "reading": asdict(reading), "right": right})
            videos.append(video.cpu())
        done = sum(r["right"]["all"] for r in rows)
        print(f"{len(rows)} of {len(prompts)} prompts, {done} all right", flush=True)
    accuracy = {name: sum(r["right"][name] for r in rows) / len(rows) for name in ATTRIBUTES}
    return {"accuracy": accuracy, "seconds": round(time.perf_counter() - begin, 1), "prompts": rows}, videos


def contact_sheet(videos: list[torch.Tensor], columns: int = 5, across: int = 2) -> torch.Tensor:
    """A picture `[H, W, 3]` of bytes: `columns` frames a video, `across` videos a row."""
    import torch

    strips = []
    for video in videos:
        picks = torch.linspace(0, len(video) - 1, columns).round().long()
        strips.append(torch.nn.functional.pad(torch.cat(list(video[picks]), dim=2), (0, 8, 0, 4), value=1.0))
    strips += [torch.ones_like(strips[0])] * (-len(strips) % across)
    rows = [torch.cat(strips[i : i + across], dim=2) for i in range(0, len(strips), across)]
    return (torch.cat(rows, dim=1).permute(1, 2, 0).clamp(0, 1) * 255).round().byte()


SHEETS = (".jpg", ".jpeg", ".png")
"""How the name of a contact sheet may end."""


def check_request(
    weights: Path | None,
    out: Path | None,
    sheet: Path | None,
    scheduler: str,
    limit: int,
    size: int,
    frames: int,
    device: str,
    **counts: int,
) -> None:
    """See, before anything is loaded, that the measurement can be made and written. Arguments are those of `main`.

    Raises:
        ValueError: what is wrong, with the option, its value and what to give.
    """
    import torch

    if weights is not None and not (weights / "model_index.json").is_file():
        raise ValueError(f"--weights is {weights}, but must be the folder of a pipeline, with a model_index.json")
    for option, file in (("--out", out), ("--sheet", sheet)):
        if file is not None and file.is_dir():
            raise ValueError(f"{option} {file} is a folder: give a file in it")
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{option} {file} needs the folder {file.parent}: make it first")
    if sheet is not None and sheet.suffix.lower() not in SHEETS:
        raise ValueError(f"--sheet is {sheet}, but its name must end in {' or '.join(SHEETS)}")
    if scheduler not in ("unipc", "euler"):
        raise ValueError(f"--scheduler is {scheduler!r}: use unipc or euler")
    if not 1 <= limit <= len(HELD_OUT_PROMPTS):
        raise ValueError(f"--limit is {limit}, but must be between 1 and {len(HELD_OUT_PROMPTS)}")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    if size < 16 or size % 16:
        raise ValueError(f"--size is {size}, but must be a multiple of 16 (8x autoencoder, patches of 2)")
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"--frames is {frames}, but must be 4k + 1, such as {world.FRAMES}")
    if device != "cpu" and not (device.partition(":")[0] == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"--device is {device!r}: use cpu, or cuda where there is a GPU")


def main(
    weights: Path | None = None,
    out: Path | None = None,
    sheet: Path | None = None,
    steps: int = modeling.STEPS,
    guidance_scale: float = modeling.GUIDANCE_SCALE,
    scheduler: str = "unipc",
    limit: int = 64,
    seed_offset: int = 0,
    batch_size: int = 8,
    size: int = world.HEIGHT,
    frames: int = world.FRAMES,
    device: str = "cpu",
    threads: int = 0,
) -> None:
    """Measure a pipeline folder (the shipped one unless --weights is given) on --limit of the held-out prompts.

    --out writes everything as JSON, --sheet a contact sheet (.jpg, .png); --scheduler is unipc (as shipped) or euler.
    """
    import torch
    import typer
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    try:
        check_request(weights, out, sheet, scheduler, limit, size, frames, device, steps=steps, batch_size=batch_size)
    except ValueError as error:
        typer.echo(f"Error: {error}.", err=True)
        raise typer.Exit(2) from None
    if threads:
        torch.set_num_threads(threads)
    pipe = WanPipeline.from_pretrained(weights or path()).to(device)
    pipe.set_progress_bar_config(disable=True)
    if scheduler == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=modeling.FLOW_SHIFT)
    picks = tuple(HELD_OUT_PROMPTS[i * len(HELD_OUT_PROMPTS) // limit] for i in range(limit))
    settings = {"steps": steps, "guidance_scale": guidance_scale, "frames": frames, "size": size}
    result, videos = evaluate(pipe, picks, batch_size, seed_offset, **settings)
    result = {
        "settings": settings | {"scheduler": scheduler, "seed_offset": seed_offset, "count": len(videos)}
    } | result
    print(json.dumps({k: v for k, v in result.items() if k != "prompts"}, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    if sheet is not None:
        import imageio.v3 as imageio

        imageio.imwrite(sheet, contact_sheet(videos).numpy())


if __name__ == "__main__":
    import typer

    typer.run(main)
