"""The guidance cache on the built-in model: what each setting gives and costs on all 64 held-out prompts.

    python benchmarks/guidance_cache_demo.py                 # an hour or two on a CPU; call it again to go on
    python benchmarks/guidance_cache_demo.py --prompts 8

Each held-out prompt is made as it is and with each setting, from one seed, one after the other in one process and on
one thread: passes of the transformer, CPU-seconds, how near each video is to the one with both passes in all steps, and
whether it shows all that the prompt says. Beside it, what else would save as many passes: fewer steps, the difference
kept as it was (as in FasterCache's CFG-Cache), and a cache over steps. Results go to
`benchmarks/results/guidance_cache_demo*`.
"""

from __future__ import annotations

import csv
import json
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, environment_line, write_markdown
from prompts import make, psnr

STEPS, FRAMES = 20, 33


@dataclass(frozen=True)
class Row:
    """A setting, and the row that its videos are held against.

    Args:
        scale: of the guidance. steps: of the run.
        preset: fields of a `Preset`.
    """

    scale: float = 2.0
    steps: int = STEPS
    preset: tuple[tuple[str, Any], ...] = ()

    @property
    def is_base(self) -> bool:
        """Whether others are held against it."""
        return not self.preset and self.steps == STEPS


def rows_of() -> dict[str, Row]:
    """What is measured, by name."""
    from vidaccel import GuidanceCache
    from vidaccel.pipelines.presets import Cache

    def cached(scale: float = 2.0, cache: Cache | None = None, **settings: Any) -> Row:
        own = (("guidance_cache", GuidanceCache(**settings)),)
        return Row(scale, preset=own if cache is None else (*own, ("cache", cache)))

    return {
        "both passes in all steps": Row(),
        "every 2": cached(every=2),
        "every 3 (default)": cached(),
        "every 4": cached(every=4),
        "every 3, difference kept": cached(extrapolation=0.0),
        "every 3, extrapolated in full": cached(extrapolation=1.0),
        "15 steps instead of 20": Row(steps=15),
        "seacache": Row(preset=(("cache", Cache("seacache")),)),
        "seacache, every 3": cached(cache=Cache("seacache")),
        "guidance 4: both passes": Row(4.0),
        "guidance 4: every 2": cached(4.0, every=2),
        "guidance 4: every 3": cached(4.0),
    }


def measured(pipe: Any, rows: dict[str, Row], number: int) -> dict[str, dict[str, Any]]:
    """All of them for one held-out prompt."""
    import vidaccel
    from vidaccel import Preset, demo

    found: dict[str, dict[str, Any]] = {}
    bases = {}
    for name, row in rows.items():
        with vidaccel.apply(pipe, Preset(**dict(row.preset))) as handle:
            made = make(pipe, demo.HELD_OUT_PROMPTS[number], number, FRAMES, row.steps, row.scale)
            counts = handle.report().counts()
        found[name] = {"seconds": made.cpu_seconds, "passes": counts["computed"], "right": made.right["all"]}
        if row.is_base:
            bases[row.scale] = made.video
        else:
            found[name]["psnr"] = psnr(made.video, bases[row.scale])
    return found


def summarise(done: list[dict[str, Any]], rows: dict[str, Row]) -> list[dict[str, Any]]:
    """One line for each row: medians and means over the prompts."""
    base = {row.scale: name for name, row in rows.items() if row.is_base}
    table = []
    for name, row in rows.items():
        found = [each["rows"][name] for each in done]
        ratios = [each["rows"][name]["seconds"] / each["rows"][base[row.scale]]["seconds"] for each in done]
        psnrs = [each["psnr"] for each in found if "psnr" in each]
        table.append(
            {
                "setting": name,
                "passes": f"{statistics.median(each['passes'] for each in found):g} of {2 * row.steps}",
                "CPU-s a video": f"{statistics.median(each['seconds'] for each in found):.2f}",
                "of both passes": "" if row.is_base else f"{statistics.median(ratios):.2f}",
                "PSNR to both passes, dB": f"{statistics.fmean(psnrs):.1f}" if psnrs else "",
                "lowest": f"{min(psnrs):.1f}" if psnrs else "",
                "right": f"{sum(each['right'] for each in found)} of {len(found)}",
            }
        )
    return table


def main(
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, and write guidance_cache_demo.jsonl (prompt by prompt), guidance_cache_demo.csv and .md."""
    import torch

    from vidaccel.generation.model_facts import inspect_model
    from vidaccel.generation.run import load

    torch.set_num_threads(1)
    logging.getLogger("vidaccel").setLevel(logging.WARNING)
    rows = rows_of()
    described = {name: repr(row) for name, row in rows.items()}
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "guidance_cache_demo.jsonl"
    done = [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []
    done = [each for each in done if each["settings"] == described]  # those of other settings do not count
    pipe = load(inspect_model("demo"), torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    for number in range(prompts):
        if any(each["number"] == number for each in done):
            continue
        done.append({"number": number, "settings": described, "rows": measured(pipe, rows, number)})
        with raw.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(number, {name: row.get("psnr") for name, row in done[-1]["rows"].items()}, flush=True)
    text = (
        f"{environment_line()}, one thread. Made by `benchmarks/guidance_cache_demo.py`.\n\n"
        f"The built-in model, {FRAMES} frames of 128x128, {STEPS} steps, on {len(done)} held-out prompts, from the "
        "same seeds in each row. CPU-seconds are the median of whole videos with text and decoding, the ratio that of "
        "pairs; passes are those of the transformer that were computed. PSNR is the mean over the prompts, to the "
        "video of both passes in all 20 steps at the same guidance scale, and the lowest of all. Right is how many "
        "videos show the shape, colour and motion that their prompt says."
    )
    table = summarise(done, rows)
    with (out / "guidance_cache_demo.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    write_markdown(out / "guidance_cache_demo.md", "Guidance cache on the built-in model", text, table)


if __name__ == "__main__":
    typer.run(main)
