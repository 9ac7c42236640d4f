"""The presets of the built-in models: what each gives and costs on all 64 held-out prompts.

    python benchmarks/preset_demo.py                 # hours on a CPU; call it again to go on
    python benchmarks/preset_demo.py --prompts 8

Each held-out prompt is made by both built-in models as they are and with each preset, from one seed, one after the
other in one process and on one thread: CPU-seconds, how near each video is to that of its own model as it is, and
whether it shows all that the prompt says. Results go to `benchmarks/results/preset_demo*`.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, append_row, environment_line, read_rows, write_csv, write_markdown


def rows_of() -> dict[str, Any]:
    """What is measured, by name: each model as it is, then the presets of it."""
    from vidaccel import Preset, demo
    from vidaccel.pipelines.presets import load_preset, shipped_presets

    plain = {model: Preset(name=model, model=model) for model in (demo.WAN, demo.DC)}
    presets = {name: load_preset(name) for name in shipped_presets()}
    return {**plain, **{name: preset for name, preset in presets.items() if preset.model in plain}}


def made(pipe: Any, location: str, preset: Any, number: int, size: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """A video `[F, H, W, 3]` of bytes; CPU-seconds of it, its passes, and whether it is right."""
    import numpy as np

    import vidaccel
    from vidaccel.demo.checker import check
    from vidaccel.generation.models.inspected import inspect_model
    from vidaccel.generation.requests.settings import Settings
    from vidaccel.generation.run import run, warm_up

    prompt = vidaccel.demo.HELD_OUT_PROMPTS[number]
    own = {"steps": preset.num_inference_steps, "guidance_scale": preset.guidance_scale}
    asked = Settings(prompt, seed=number, **own, **size)
    settings = asked.checked(inspect_model(preset.model))
    with vidaccel.apply(pipe, preset, base=location) as handle:
        warm_up(pipe, settings, None)  # merges what guidance in one pass adds, once for many videos elsewhere
        handle.reset()
        begin = time.thread_time()
        frames = (run(pipe, settings).frames * 255).round().astype(np.uint8)
        seconds = time.thread_time() - begin
        counts = handle.report().counts()
    right = check(frames).agrees_with(prompt)["all"]
    return frames, {"seconds": seconds, "passes": counts["computed"], "of": counts["forwards"], "right": right}


def measured(
    pipes: dict[str, Any], rows: dict[str, Any], number: int, size: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """All of them for one held-out prompt."""
    from vidaccel.generation.report.comparison import compare

    found, plain = {}, {}
    for name, preset in rows.items():
        pipe, location = pipes[preset.model]
        frames, found[name] = made(pipe, location, preset, number, size)
        if name == preset.model:
            plain[name] = frames
        else:
            found[name]["psnr"] = min(100.0, compare(plain[preset.model], frames).mean_psnr)
    return found


def summarise(done: list[dict[str, Any]], rows: dict[str, Any]) -> list[dict[str, Any]]:
    """One line for each row of the measurement: medians and means over the prompts."""
    first = statistics.median(each["rows"]["demo"]["seconds"] for each in done)
    table = []
    for name, preset in rows.items():
        found = [each["rows"][name] for each in done]
        seconds = statistics.median(row["seconds"] for row in found)
        psnr = [row["psnr"] for row in found if "psnr" in row]
        passes = f"{statistics.median(row['passes'] for row in found):g} of {found[0]['of']}"
        table.append(
            {
                "preset": f"{name}, as it is" if name == preset.model else name,
                "passes": passes,
                "CPU-s a video": f"{seconds:.2f}",
                "times as fast as demo": f"{first / seconds:.2f}",
                "PSNR to its model as it is, dB": f"{statistics.fmean(psnr):.1f}" if psnr else "",
                "right": f"{sum(row['right'] for row in found)} of {len(found)}",
            }
        )
    return table


def main(
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 64,
    small: Annotated[bool, typer.Option("--small", help="Videos of 9 frames of 64x64: to try the script.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, and write preset_demo.jsonl (prompt by prompt), preset_demo.csv and preset_demo.md."""
    import torch

    from vidaccel.generation.models.inspected import inspect_model
    from vidaccel.generation.run import load

    torch.set_num_threads(1)
    logging.getLogger("vidaccel").setLevel(logging.WARNING)
    rows = rows_of()
    # What was measured of a preset does not make it another.
    told = json.dumps({name: replace(preset, measured={}).to_dict() for name, preset in rows.items()})
    described = json.loads(told.replace(f"{Path(__file__).resolve().parents[1].as_posix()}/", ""))  # the same anywhere
    size = {"frames": 9, "height": 64, "width": 64} if small else {}
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "preset_demo.jsonl"
    done = read_rows(raw, to_append=True)
    # Those of other settings do not count.
    done = [each for each in done if each["presets"] == described and each.get("size", {}) == size]
    pipes = {}
    for model in ("demo", "demo-dc"):
        facts = inspect_model(model)
        pipes[model] = load(facts, torch.float32, "cpu"), facts.location
        pipes[model][0].set_progress_bar_config(disable=True)
    for number in range(prompts):
        if any(each["number"] == number for each in done):
            continue
        each = {"number": number, "size": size, "presets": described, "rows": measured(pipes, rows, number, size)}
        done.append(each)
        append_row(raw, each)
        print(
            number, {name: (round(row["seconds"], 2), row["right"]) for name, row in each["rows"].items()}, flush=True
        )
    text = (
        f"{environment_line()}, one thread. Made by `benchmarks/preset_demo.py`.\n\n"
        f"The presets of the built-in models on {len(done)} held-out prompts, from the same seeds in each row, all in "
        "one process. CPU-seconds are the median of whole videos with text and decoding, after a step that is not "
        "counted; passes are those of the transformer that were computed. PSNR is the mean over the prompts, to the "
        "video of the same model as it is. Right is how many videos show the shape, colour and motion that their "
        "prompt says."
    )
    table = summarise(done, rows)
    write_csv(out / "preset_demo.csv", table)
    write_markdown(out / "preset_demo.md", "Presets of the built-in models", text, table)


if __name__ == "__main__":
    typer.run(main)
