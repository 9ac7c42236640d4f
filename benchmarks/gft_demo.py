"""Guidance in one pass on the built-in models: what adapters of the recipe `gft` have learned, and what they save.

    python benchmarks/gft_demo.py                                          # the shipped ones: hours on a CPU
    python benchmarks/gft_demo.py --adapter demo=runs/demo_gft/adapter     # this one alone

Each held-out prompt is made with guidance in two passes, without guidance, and in one pass with the adapter, from one
seed and in one process: how near the last two are to the first, whether the videos show all that the prompt says, and
CPU-seconds. Then, on scenes that no training has seen, the share of what guidance changes in the velocity that the
adapter makes. Results go to `benchmarks/results/gft_demo*`; a run that was broken off goes on where it stopped, and
videos of another adapter are made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, append_row, environment_line, read_rows, write_markdown
from prompts import make, psnr

MODELS = {"demo": ("demo_gft", 33), "demo-dc": ("demo_dc_gft", 32)}
"""Built-in model -> its ready settings and the frames that it makes."""
TWO, NONE, ONE = WAYS = ("two passes", "none", "one pass, adapter")
UNSEEN = 77_000_000
"""Seed of the scenes that are measured on; those of trainings are small numbers."""


def shipped(model: str) -> Path:
    """The adapter that a built-in model has of its own.

    Raises:
        BadParameter: it has none.
    """
    from vidaccel import demo
    from vidaccel.pipelines.guidance_free.adapter_file import OWN_FILE

    file = demo.path(model) / "transformer" / OWN_FILE
    if not file.is_file():
        ready = MODELS[model][0]
        raise typer.BadParameter(
            f"{model} has no adapter of its own: make one with `vidaccel adapt gft --config {ready}`, and give it as "
            f"--adapter {model}=runs/{ready}/adapter."
        )
    return file


def loaded(model: str) -> Any:
    """The pipeline of a built-in model, without progress bars."""
    from diffusers import WanPipeline

    from vidaccel import DCVideoGenPipeline, demo

    pipe = (WanPipeline if model == demo.WAN else DCVideoGenPipeline).from_pretrained(demo.path(model))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made(pipe: Any, frames: int, prompt: str, seed: int, scale: float, steps: int) -> tuple[Any, dict[str, Any]]:
    """A video `[F, H, W, 3]` in [0, 1], CPU-seconds of a step and of the whole, and whether it is right."""
    found = make(pipe, prompt, seed, frames, steps, scale)
    return found.video, {"step": found.step_seconds, "video": found.cpu_seconds, "right": found.right["all"]}


def compared(pipe: Any, adapter: Path, model: str, number: int, scale: float, steps: int) -> dict[str, dict]:
    """A held-out prompt in each of the ways; they take turns in which comes first."""
    import vidaccel
    from vidaccel import demo

    prompt, frames = demo.HELD_OUT_PROMPTS[number], MODELS[model][1]
    videos, rows = {}, {}
    for way in (*WAYS[number % 3 :], *WAYS[: number % 3]):
        if way == ONE:
            with vidaccel.guidance_free(pipe, adapter):
                videos[way], rows[way] = made(pipe, frames, prompt, number, scale, steps)
        else:
            videos[way], rows[way] = made(pipe, frames, prompt, number, scale if way == TWO else 1.0, steps)
    for way in (NONE, ONE):
        rows[way]["psnr"] = psnr(videos[way], videos[TWO])
    return rows


def learned(model: str, adapter: Path, clips: int) -> dict[str, float]:
    """The shares that a validation of the recipe tells, on scenes that no training has seen."""
    import torch

    from vidaccel.lora import config_folder
    from vidaccel.lora.adapters.lora_file import lora_path, read_facts
    from vidaccel.lora.config import build, read
    from vidaccel.lora.recipes.base import Process
    from vidaccel.lora.recipes.gft import TrainGuidanceFree

    facts = read_facts(lora_path(adapter, "--adapter"), "--adapter")
    with tempfile.TemporaryDirectory() as work:
        changes = [
            f"out={work}",
            f"lora.start={adapter}",
            f"lora.rank={facts['rank']}",
            f"gft.max_scale={facts['guidance_free']['max_scale']}",
            f"gft.gated={str(facts['guidance_free']['gated']).lower()}",
            f"seed={UNSEEN}",
            f"data.clips={clips + 1}",
            f"data.cache={work}/cache",
            f"validation.clips={clips}",
            "validation.prompts=[]",
        ]
        settings = read(config_folder() / f"{MODELS[model][0]}.yaml", changes)
        recipe = TrainGuidanceFree(build(TrainGuidanceFree.Config, settings), Process(torch.device("cpu")))
        recipe.prepare()
        [phase] = recipe.phases()
        phase.clips()
        values = phase.validate(phase.setup({}).eval(), Path(work), 0)
        phase.close()
    return {name: value for name, value in values.items() if name.startswith(("explained_", "off_"))}


def rows_to_make(
    models: dict[str, Path], scales: list[float], steps: list[int], prompts: int, done: list[dict]
) -> Iterator[dict[str, Any]]:
    """What is missing among the rows: all prompts of a setting before the next one."""
    kept = {row["key"] for row in done}
    for model, adapter in models.items():
        digest = hashlib.sha256(adapter.read_bytes()).hexdigest()[:12]
        for count in steps:
            for scale in scales:
                for number in range(prompts):
                    key = f"{model} {digest} {count} {scale:g} {number}"
                    if key not in kept:
                        yield {"key": key, "model": model, "steps": count, "scale": scale, "number": number}


def summarise(rows: list[dict]) -> list[dict]:
    """One line for each model, number of steps, scale and way: means over the prompts."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["steps"], row["scale"]), []).append(row)
    table = []
    for (model, steps, scale), group in sorted(groups.items()):
        two = statistics.median(row["ways"][TWO]["step"] for row in group)
        for way in WAYS:
            found = [row["ways"][way] for row in group]
            step = statistics.median(row["step"] for row in found)
            psnr = [row["psnr"] for row in found if "psnr" in row]
            table.append(
                {
                    "model": model,
                    "steps": steps,
                    "scale": f"{scale:g}",
                    "guidance": way,
                    "PSNR to two passes, dB": f"{statistics.fmean(psnr):.1f}" if psnr else "",
                    "right": f"{sum(row['right'] for row in found)} of {len(found)}",
                    "CPU-s a step": f"{step:.3f}",
                    "of two passes": f"{step / two:.2f}",
                    "CPU-s a video": f"{statistics.median(row['video'] for row in found):.2f}",
                }
            )
    return table


def chosen(given: list[str]) -> dict[str, Path]:
    """`["demo=PATH"]` as adapters by model; without any, the shipped ones.

    Raises:
        BadParameter: another form, or no such model, or no such adapter.
    """
    from vidaccel.pipelines.guidance_free import GuidanceFreeError, read_adapter

    pairs = [text.partition("=")[::2] for text in given] or [(model, "") for model in MODELS]
    for model, _ in pairs:
        if model not in MODELS:
            raise typer.BadParameter(f"--adapter has the form MODEL=PATH, MODEL one of {', '.join(MODELS)}.")
    try:
        return {model: read_adapter(path or shipped(model)).path for model, path in pairs}
    except GuidanceFreeError as error:
        raise typer.BadParameter(f"--adapter: {error}") from error


def main(
    adapter: Annotated[
        list[str] | None, typer.Option(help="MODEL=PATH, measured alone; MODEL= for the shipped one. Repeatable.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 64,
    steps: Annotated[list[int] | None, typer.Option(min=3, help="Of each video; repeatable.  [20, 6]")] = None,
    scale: Annotated[list[float] | None, typer.Option(min=1, help="Of the guidance; repeatable.  [2]")] = None,
    clips: Annotated[int, typer.Option(min=0, help="Unseen scenes for the shares; 0 leaves them out.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, and write gft_demo.jsonl (row by row), gft_demo.json and gft_demo.md."""
    import torch

    torch.set_num_threads(1)
    logging.getLogger("vidaccel").setLevel(logging.WARNING)
    models = chosen(adapter or [])
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "gft_demo.jsonl"
    rows = read_rows(raw, to_append=True)
    pipes: dict[str, Any] = {}
    for row in rows_to_make(models, scale or [2.0], steps or [20, 6], prompts, rows):
        model = row["model"]
        if model not in pipes:
            pipes = {model: loaded(model)}
        row["ways"] = compared(pipes[model], models[model], model, row["number"], row["scale"], row["steps"])
        rows.append(row)
        append_row(raw, row)
        psnr = ", ".join(f"{way}: {found['psnr']:.1f} dB" for way, found in row["ways"].items() if "psnr" in found)
        print(f"{row['key']}: {psnr}", flush=True)
    digests = {hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in models.values()}
    own = [row for row in rows if row["key"].split()[1] in digests]
    shares = [
        {"model": model, "bytes": path.stat().st_size}
        | {name.replace("_", " at "): round(value, 4) for name, value in learned(model, path, clips).items()}
        for model, path in models.items()
        if clips
    ]
    table = summarise(own)
    facts = {"environment": environment_line(), "shares": shares, "videos": table}
    (out / "gft_demo.json").write_text(json.dumps(facts, indent=1) + "\n")
    text = (
        f"{facts['environment']}, one thread. Made by `benchmarks/gft_demo.py`.\n\n"
        "Guidance-free adapters of the built-in models. The first table has the videos of held-out prompts, from the "
        "same seeds in each row of a group: how near they are to those of guidance in two passes, how many show all "
        "that their prompt says, and the CPU-seconds of a step (median; of an adapter without the first step, which "
        "merges it) and of a whole video with encoding and decoding. The second has, for scenes that no training has "
        "seen, the share of what guidance at a scale changes in the velocity that the adapter makes (1 is all of it), "
        "and its error at a scale of 1 relative to what a scale of 2 changes."
    )
    tables = [found for found in (table, shares) if found]
    write_markdown(out / "gft_demo.md", "Guidance in one pass on the built-in models", text, *tables)


if __name__ == "__main__":
    typer.run(main)
