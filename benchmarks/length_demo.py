"""Longer videos with the built-in Wan model: what a LoRA of the recipe `length` does at twice its length.

    python benchmarks/length_demo.py --adapter runs/demo_length/adapter
    python benchmarks/length_demo.py --adapter runs/demo_length_129/adapter --frames 129
    python benchmarks/length_demo.py --cost

Videos of held-out prompts are made at 65 frames, of which the model saw 33, and read from their pixels: by the model
as it is, dense and by Radial Attention, with RIFLEx, with LVSA, and with the LoRAs. Each video is a line of
`benchmarks/results/length_demo.jsonl`, and a call makes those that are missing. `--cost` measures a step of training
instead, sparse beside dense. Tables go to `benchmarks/results/length_demo.md`; of another length, to
`length_demo_129.*`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, append_row, environment_line, read_rows, write_markdown
from prompts import make

BASE_FRAMES = 9  # latent, of the 33 that the model was trained on
READ = ("shape", "colour", "background", "motion", "all")
SPARSE = {"density": 0.3, "block_size": 32}


def ways(adapter: Path | None, dense_adapter: Path | None) -> dict[str, Any]:
    """Name -> what puts a pipeline into that state, a function of the pipeline and the layout that gives a context."""
    import vidaccel
    from vidaccel import LVSA, DenseSchedule, Radial, Riflex

    first = DenseSchedule(first_layers=1)

    def radial(pipe: Any, layout: Any) -> Any:
        return vidaccel.accelerate(pipe, Radial.for_density(layout, **SPARSE, schedule=first))

    @contextlib.contextmanager
    def radial_riflex(pipe: Any, layout: Any) -> Any:
        with vidaccel.riflex(pipe, Riflex(BASE_FRAMES)), radial(pipe, layout):
            yield

    found = {
        "dense": lambda pipe, layout: contextlib.nullcontext(),
        "Radial": radial,
        "RIFLEx": lambda pipe, layout: vidaccel.riflex(pipe, Riflex(BASE_FRAMES)),
        "Radial, RIFLEx": radial_riflex,
        "LVSA": lambda pipe, layout: vidaccel.accelerate(pipe, LVSA(reference=BASE_FRAMES, schedule=first)),
    }
    for name, place in (("dense + LoRA", dense_adapter), ("Radial + LoRA", adapter)):
        if place is not None:
            found[f"{name}, {label(place)}"] = lambda pipe, layout, place=place: vidaccel.lengthen(pipe, place)
    return found


def label(adapter: Path) -> str:
    """The step of an adapter's checkpoint, or that it is the result."""
    folder = adapter.resolve().parent.name
    return f"step {int(folder.removeprefix('step_'))}" if folder.startswith("step_") else "trained"


def measure(
    path: Path, adapters: tuple[Path | None, Path | None], only: str, prompts: int, frames: int, steps: int
) -> list[dict]:
    """Make the videos that `path` lacks; all lines of it."""
    from diffusers import WanPipeline

    from vidaccel import VideoLayout, demo

    rows = read_rows(path, to_append=True)
    settings = {"frames": frames, "steps": steps}
    for row in rows:
        if row["settings"] != settings:
            raise typer.BadParameter(f"{path} was made with {row['settings']}, not {settings}: delete it.")
    done = {(row["way"], row["prompt"]) for row in rows}
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    layout = VideoLayout((frames - 1) // 4 + 1, 8, 8)
    # In an order in which the first ones are spread over all prompts.
    numbers = sorted(range(len(demo.HELD_OUT_PROMPTS)), key=lambda n: f"{n:06b}"[::-1])[:prompts]
    for name, enter in ways(*adapters).items():
        missing = [n for n in numbers if (name, demo.HELD_OUT_PROMPTS[n]) not in done]
        if only not in name or not missing:
            continue
        with enter(pipe, layout):
            for number in missing:
                prompt = demo.HELD_OUT_PROMPTS[number]
                made = make(pipe, prompt, number, frames, steps, scale=2.0)
                row = {
                    "way": name,
                    "prompt": prompt,
                    "seed": number,
                    "right": made.right,
                    "seconds": round(made.seconds, 2),
                    "cpu_seconds": round(made.cpu_seconds, 2),
                    "settings": settings,
                }
                rows.append(row)
                append_row(path, row)
                print(name, number, made.right, f"{row['seconds']:.1f} s", flush=True)
    return rows


def summary(rows: list[dict]) -> list[dict]:
    """A line a way: how many videos show what their prompts say."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["way"], []).append(row)
    return [
        {
            "way": name,
            "videos": len(group),
            **{f"{what} right": sum(row["right"][what] for row in group) for what in READ},
            "CPU seconds": round(statistics.median(row["cpu_seconds"] for row in group), 1),
        }
        for name, group in groups.items()
    ]


def cost(repeats: int) -> list[dict]:
    """CPU-seconds of a step of the training of one clip: forward and backward pass of a LoRA of rank 64."""
    import torch

    from vidaccel import DenseSchedule, Radial, accelerate, demo
    from vidaccel.attention.methods.base import OutOfReach
    from vidaccel.lora.adapters.adapter import add_lora, layers_named
    from vidaccel.lora.backbones.base import ModelOptions
    from vidaccel.lora.backbones.wan_own import WanModel
    from vidaccel.lora.recipes.flow_phase import train_only

    model = WanModel(str(demo.path()), ModelOptions(merge_text_padding=True))
    text = model.text_encoder().encode(["a red circle moves left on a grey background"])
    transformer = model.transformer()
    add_lora(transformer, layers_named(transformer, model.self_attention, ""), 64, 64, 0.0)
    train_only(transformer, lambda name: ".lora_" in name)
    rows = []
    for frames in (65, 129, 257):
        layout = model.layout(frames, 128, 128)
        latents, sigma = torch.randn(1, 8, layout.frames, 16, 16), torch.full((1,), 0.5)

        def step(latents=latents, sigma=sigma) -> float:
            began = time.process_time()
            model.velocity(transformer, latents, sigma, text, {}).square().mean().backward()
            return time.process_time() - began

        def told(repeats=repeats, step=step) -> float:
            step()
            return round(min(step() for _ in range(repeats)), 2)

        row = {"frames": frames, "tokens": layout.tokens, "dense": told()}
        for block, backend in ((64, "gather"), (32, "gather"), (16, "gather"), (32, "masked")):
            try:
                schedule = DenseSchedule(first_layers=1)
                method = Radial.for_density(layout, SPARSE["density"], block_size=block, schedule=schedule)
            except OutOfReach as error:
                row[f"{backend}, blocks of {block}"] = f"from {error.least:.2f}"
                continue
            with accelerate(transformer, method, backend=backend):
                row[f"{backend}, blocks of {block}"] = f"{told()} ({method.expected_density(layout):.2f})"
        rows.append(row)
        print(row, flush=True)
    return rows


def main(
    adapter: Annotated[Path | None, typer.Option(help="Folder of the LoRA that was trained sparse.")] = None,
    dense_adapter: Annotated[Path | None, typer.Option(help="Folder of the one that was trained dense.")] = None,
    only: Annotated[str, typer.Option(help="Part of the names of the ways to make videos in.")] = "",
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 64,
    frames: Annotated[int, typer.Option(min=5, help="Of each video.")] = 65,
    denoising_steps: Annotated[int, typer.Option(min=1, help="Of each video.")] = 10,
    cost_of_training: Annotated[bool, typer.Option("--cost", help="Measure steps of the training instead.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of which the quickest counts.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Make the videos that are missing, and write length_demo.md."""
    import torch

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    costs = out / "length_demo_cost.json"
    if cost_of_training:
        made = {"environment": environment_line(), "rows": cost(repeats)}
        costs.write_text(json.dumps(made, indent=1) + "\n")
    name = "length_demo" if frames == 65 else f"length_demo_{frames}"
    raw = out / f"{name}.jsonl"
    if cost_of_training:
        rows = read_rows(raw)
    else:
        rows = measure(raw, (adapter, dense_adapter), only, prompts, frames, denoising_steps)
    tables, priced = [summary(rows)] if rows else [], costs.exists() and frames == 65
    text = (
        f"{environment_line()}, one thread, on a machine with other work. Made by `python "
        "benchmarks/length_demo.py`.\n\n"
        f"{'First table: videos' if priced else 'Videos'} of {frames} frames of 128x128 "
        f"({64 * ((frames - 1) // 4 + 1):,} tokens), where the model was trained on 33; held-out prompts, "
        f"{denoising_steps} steps, guidance 2, the same seeds in each row, read "
        "from their pixels. The numbers count videos. *Radial* computes about 29 % of the pairs, in blocks of 32 "
        "tokens (64 with the LoRA of 129 frames), with the first of six layers dense and all steps sparse; *RIFLEx* "
        "and *LVSA* need no training; the LoRAs are named with the step of their training."
    )
    if priced:
        tables.append(json.loads(costs.read_text())["rows"])
        text += (
            "\n\nSecond table: CPU-seconds of a step of the training of one clip, forward and backward, a LoRA of rank "
            "64 on the projections of self-attention; dense, and by Radial Attention at a density of about 0.3 (the "
            "real one in brackets; *from* is the least that blocks of this size reach), with the first layer dense."
        )
    write_markdown(out / f"{name}.md", "Longer videos with the built-in model", text, *tables)


if __name__ == "__main__":
    typer.run(main)
