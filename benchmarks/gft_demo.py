"""Guidance in one pass on the built-in Wan model: what an adapter of the recipe `gft` has learned, and what it saves.

    python benchmarks/gft_demo.py

Trains with the ready settings `demo_gft` (a call goes on where the last one stopped), then makes the videos of held-out
prompts with guidance in two passes, without guidance, and with the adapter, from the same seeds, and compares them.
Results go to `benchmarks/results/gft_demo*`.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, environment_line, write_markdown


def made(pipe: Any, prompts: tuple[str, ...], scale: float, steps: int) -> tuple[list, list[float], list[bool]]:
    """Videos `[F, H, W, 3]` in [0, 1], the seconds of their steps, and whether they show what their prompts say."""
    import torch

    from vidaccel.demo.checker import check
    from vidaccel.demo.world import parse_caption

    videos, seconds, right = [], [], []
    for number, prompt in enumerate(prompts):
        ends: list[float] = []
        video = pipe(
            prompt,
            num_frames=33,
            height=128,
            width=128,
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(number),
            output_type="np",
            callback_on_step_end=lambda pipe, step, t, tensors, ends=ends: ends.append(time.perf_counter()) or tensors,
        ).frames[0]
        videos.append(video)
        seconds.append((ends[-1] - ends[0]) / (len(ends) - 1))
        reading = check(torch.from_numpy(video).permute(0, 3, 1, 2))
        right.append((reading.shape, reading.colour, reading.motion, reading.background) == parse_caption(prompt))
    return videos, seconds, right


def compare(adapter: Path, scales: list[float], count: int, steps: int) -> list[dict]:
    """A row for each scale and way of guidance."""
    import numpy as np
    from diffusers import WanPipeline

    import vidaccel
    from vidaccel import demo

    prompts = tuple(demo.HELD_OUT_PROMPTS[i * len(demo.HELD_OUT_PROMPTS) // count] for i in range(count))
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    rows = []
    plain = made(pipe, prompts, 1.0, steps)
    for scale in scales:
        two = made(pipe, prompts, scale, steps)
        with vidaccel.guidance_free(pipe, adapter):
            one = made(pipe, prompts, scale, steps)
        for name, (videos, seconds, right) in (("two passes", two), ("none", plain), ("one pass, adapter", one)):
            pairs = zip(videos, two[0], strict=True)
            distances = [-10 * np.log10(max(1e-10, float(((a - b) ** 2).mean()))) for a, b in pairs]
            rows.append(
                {
                    "scale": f"{scale:g}",
                    "guidance": name,
                    "PSNR to two passes, dB": "" if videos is two[0] else f"{statistics.fmean(distances):.1f}",
                    "seconds a step": f"{statistics.median(seconds):.2f}",
                    "right": f"{sum(right)} of {count}",
                }
            )
    return rows


def main(
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 8,
    denoising_steps: Annotated[int, typer.Option(min=2, help="Of each video.")] = 10,
    work: Annotated[Path, typer.Option(help="Folder of cache and run, used again where it is there.")] = Path(
        "runs/gft_demo"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Train and measure, and write gft_demo.md and gft_demo.json."""
    import torch

    from vidaccel.lora import config_folder, run

    torch.set_num_threads(1)
    changes = [f"out={work / 'run'}", f"data.cache={work / 'cache'}"]
    adapter = Path(run("gft", config_folder() / "demo_gft.yaml", changes, resume="auto")["lora"])
    log = [json.loads(line) for line in (work / "run" / "log.jsonl").read_text().splitlines()]
    named = {"validation_explained_": "explained at ", "validation_off_": "off at "}
    learned = [
        {"step": row["step"]}
        | {
            new + key.removeprefix(old): round(value, 4)
            for key, value in row.items()
            for old, new in named.items()
            if key.startswith(old)
        }
        for row in log
        if "validation_error" in row
    ]
    rows = compare(adapter, [2.0, 4.0], prompts, denoising_steps)
    facts = {"environment": environment_line(), "bytes": adapter.stat().st_size}
    out.mkdir(parents=True, exist_ok=True)
    (out / "gft_demo.json").write_text(json.dumps({**facts, "learned": learned, "videos": rows}, indent=1) + "\n")
    text = (
        f"{facts['environment']}, one thread, on a machine with other work. Made by `benchmarks/gft_demo.py`.\n\n"
        f"A guidance-free adapter ({facts['bytes'] / 1e6:.1f} MB) of the built-in Wan model, trained with the ready "
        f"settings `demo_gft`. The first table has the videos of {prompts} held-out prompts with {denoising_steps} "
        "steps and the same seeds in each row: how near they are to those of guidance in two passes, the median time "
        "of a step, and how many show all that their prompt says. "
        "The second has, for held-out clips, the share of what guidance at a scale changes in the velocity that the "
        "adapter makes (1 is all of it), and its error at a scale of 1 relative to what a scale of 2 changes."
    )
    write_markdown(out / "gft_demo.md", "Guidance in one pass on the built-in model", text, rows, learned)


if __name__ == "__main__":
    typer.run(main)
