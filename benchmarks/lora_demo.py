"""A LoRA on the built-in Wan model that teaches it a rule which it does not have, measured on prompts it never saw.

    python benchmarks/lora_demo.py

The rule: an object has the colour that follows the one its caption names (red is drawn green, green blue, and so on).
Video files with such clips are written, and a LoRA is trained on them with the recipe `lora`, in one thread. Then the
videos of held-out prompts, of which no clip was trained on, are read from their pixels, made with the base and with the
LoRA from the same seeds. Results go to `benchmarks/results/lora_demo*`.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from common import RESULTS, environment_line, write_markdown

FRAMES = 33


def follower(colour: str) -> str:
    """The colour in which the rule draws one."""
    from vidaccel.demo.world import COLOURS

    known = list(COLOURS)
    return known[(known.index(colour) + 1) % len(known)]


def write_clips(folder: Path, count: int, size: int) -> None:
    """Clips of the rule, with captions that training may see."""
    import imageio.v2 as imageio

    from vidaccel.demo import world

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        scene = world.sample_scene(70_000_000 + number)
        frames = world.render(replace(scene, colour=follower(scene.colour)), FRAMES, size, size)
        pixels = (frames.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        name = f"{number:04d}.mp4"
        imageio.mimwrite(folder / name, pixels, fps=16, macro_block_size=2, output_params=["-crf", "5"])
        rows.append({"file_name": name, "text": scene.caption})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def train(folder: Path, steps: int, rank: int, batch_size: int, learning_rate: float, size: int) -> Path:
    """The folder of the LoRA."""
    from vidaccel.lora import run

    settings = {
        "recipe": "lora",
        "out": str(folder / "run"),
        "model": {"base": "demo", "merge_text_padding": True},
        "lora": {"rank": rank},
        "data": {
            "kind": "videos",
            "folder": str(folder / "clips"),
            "sizes": [{"frames": FRAMES, "height": size, "width": size}],
            "cache": str(folder / "cache"),
        },
        "train": {
            "steps": steps,
            "learning_rate": learning_rate,
            "lr_warmup_steps": 10,
            "lr_scheduler": "cosine",
            "batch_size": batch_size,
        },
        "validation": {"clips": 8},
        "loop": {"tracker": "none", "device": "cpu", "threads": 1, "log_every": 10, "validate_every": 50},
    }
    (folder / "settings.yaml").write_text(json.dumps(settings, indent=1))
    return Path(run("lora", folder / "settings.yaml", resume="auto")["lora"]).parent


def measure(adapter: Path, weights: list[float], prompts: int, steps: int, size: int) -> list[dict]:
    """Shares of the videos that show what the rule says, and what the caption says."""
    from diffusers import WanPipeline

    from vidaccel import demo
    from vidaccel.demo.evaluate import evaluate
    from vidaccel.demo.world import parse_caption

    picks = tuple(demo.HELD_OUT_PROMPTS[i * len(demo.HELD_OUT_PROMPTS) // prompts] for i in range(prompts))
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapter, adapter_name="rule")
    rows = []
    for weight in weights:
        pipe.set_adapters(["rule"], [weight])
        result, _ = evaluate(pipe, picks, 4, steps=steps, size=size)
        read = [(parse_caption(row["prompt"])[1], row["reading"]["colour"], row["right"]) for row in result["prompts"]]
        rows.append(
            {
                "LoRA": {0.0: "none: the base"}.get(weight, f"weight {weight:g}"),
                "prompts": prompts,
                "colour of the rule": sum(shown == follower(named) for named, shown, _ in read),
                "colour of the caption": sum(shown == named for named, shown, _ in read),
                **{name: sum(right[name] for *_, right in read) for name in ("shape", "motion", "background")},
                "all by the rule": sum(
                    shown == follower(named) and right["shape"] and right["motion"] and right["background"]
                    for named, shown, right in read
                ),
            }
        )
    return rows


def main(
    steps: Annotated[int, typer.Option(min=1, help="Of training.")] = 200,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="The peak.")] = 1e-3,
    clips: Annotated[int, typer.Option(min=20, help="Video files that are trained on, 8 of them held out.")] = 160,
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 32,
    denoising_steps: Annotated[int, typer.Option(min=1, help="Of each measured video.")] = 10,
    size: Annotated[int, typer.Option(min=64, help="Pixels of a side; the model was trained at 128.")] = 128,
    work: Annotated[Path, typer.Option(help="Folder of clips and run, used again where it is there.")] = Path(
        "runs/lora_demo"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Train and measure, and write lora_demo.md and lora_demo.json."""
    import torch

    torch.set_num_threads(1)
    if not (work / "clips" / "metadata.jsonl").is_file():
        write_clips(work / "clips", clips, size)
    began, used = time.perf_counter(), time.process_time()
    adapter = train(work, steps, rank, batch_size, learning_rate, size)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
    log = [json.loads(line) for line in (work / "run" / "log.jsonl").read_text().splitlines()]
    errors = [
        {"step": row["step"], "flow error of held-out clips": round(row["validation_error"], 4)}
        for row in log
        if "validation_error" in row
    ]
    rows = measure(adapter, [0.0, 1.0], prompts, denoising_steps, size)
    file_bytes = (adapter / "pytorch_lora_weights.safetensors").stat().st_size
    facts = {
        "environment": environment_line(),
        "steps": steps,
        "batch_size": batch_size,
        "rank": rank,
        "learning_rate": learning_rate,
        "clips": clips,
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "bytes": file_bytes,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "lora_demo.json").write_text(json.dumps({**facts, "errors": errors, "videos": rows}, indent=1) + "\n")
    text = (
        f"{facts['environment']}. Made by `python benchmarks/lora_demo.py`.\n\n"
        f"A LoRA of rank {rank} ({file_bytes / 1e6:.1f} MB) on the built-in Wan model, {steps} steps of {batch_size} "
        f"clips, learning rate {learning_rate:g}, from {clips} video files in which each object has the colour after "
        f"the one that its caption names. Encoding and training took {seconds:.0f} s ({cpu_seconds:.0f} s of one core, "
        f"on a machine with other work). The videos are of {prompts} held-out prompts, of which no clip was trained "
        f"on, with {denoising_steps} steps and guidance 2, the same seeds in each row, read from their pixels; the "
        "numbers count videos."
    )
    write_markdown(out / "lora_demo.md", "What a LoRA teaches the built-in model", text, rows, errors)


if __name__ == "__main__":
    typer.run(main)
