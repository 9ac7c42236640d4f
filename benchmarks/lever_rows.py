"""Settings of presets on held-out prompts of the built-in model, each held against the run without.

For `forecast_cache_demo.py` and `guidance_cache_demo.py`.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import append_row, environment_line, read_rows, write_csv, write_markdown
from prompts import make, psnr

STEPS, FRAMES = 20, 33


@dataclass(frozen=True)
class Row:
    """A setting, and the row that its videos are held against: of the same guidance, without a preset.

    Args:
        scale: of the guidance. steps: of the run.
        preset: fields of a `Preset`.
        against: steps of the row that it is held against.
    """

    scale: float = 2.0
    steps: int = STEPS
    preset: tuple[tuple[str, Any], ...] = ()
    against: int = field(default=STEPS, repr=False)  # it follows from the row's name, and old results do not have it

    @property
    def is_base(self) -> bool:
        """Whether others are held against it."""
        return not self.preset and self.steps == self.against

    @property
    def base(self) -> tuple[float, int]:
        """What tells the row that it is held against."""
        return self.scale, self.against


def measured(pipe: Any, rows: Mapping[str, Row], number: int) -> dict[str, dict[str, Any]]:
    """All of them for one held-out prompt; those that others are held against come first."""
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
            bases[row.base] = made.video
        else:
            found[name]["psnr"] = psnr(made.video, bases[row.base])
    return found


def summarise(done: list[dict[str, Any]], rows: Mapping[str, Row], plain: str) -> list[dict[str, Any]]:
    """One line for each row: medians and means over the prompts.

    Args:
        done: of each prompt, what `measured` found as "rows".
        rows: by name.
        plain: what the rows are called that others are held against.
    """
    bases = {row.base: name for name, row in rows.items() if row.is_base}
    table = []
    for name, row in rows.items():
        found = [each["rows"][name] for each in done]
        ratios = [each["rows"][name]["seconds"] / each["rows"][bases[row.base]]["seconds"] for each in done]
        psnrs = [each["psnr"] for each in found if "psnr" in each]
        table.append(
            {
                "setting": name,
                "passes": f"{statistics.fmean(each['passes'] for each in found):.3g} of {2 * row.steps}",
                "CPU-s a video": f"{statistics.median(each['seconds'] for each in found):.2f}",
                f"of {plain}": "" if row.is_base else f"{statistics.median(ratios):.2f}",
                f"PSNR to {plain}, dB": f"{statistics.fmean(psnrs):.1f}" if psnrs else "",
                "lowest": f"{min(psnrs):.1f}" if psnrs else "",
                "right": f"{sum(each['right'] for each in found)} of {len(found)}",
            }
        )
    return table


def run(name: str, title: str, about: str, rows: Mapping[str, Row], plain: str, prompts: int, out: Path) -> None:
    """Measure what is not measured yet, and write `name`.jsonl (prompt by prompt), .csv and .md.

    Args:
        name: of the script and its results. title: of the table. about: what it holds, in sentences.
        rows: by name. plain: see `summarise`.
        prompts: held-out ones, from the first on.
        out: folder of the results.
    """
    import torch

    from vidaccel.generation.models.inspected import inspect_model
    from vidaccel.generation.run import load

    torch.set_num_threads(1)
    logging.getLogger("vidaccel").setLevel(logging.WARNING)
    described = {name: repr(row) for name, row in rows.items()}
    out.mkdir(parents=True, exist_ok=True)
    raw = out / f"{name}.jsonl"
    done = read_rows(raw, to_append=True)
    done = [each for each in done if each["settings"] == described]  # those of other settings do not count
    pipe = load(inspect_model("demo"), torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    for number in range(prompts):
        if any(each["number"] == number for each in done):
            continue
        done.append({"number": number, "settings": described, "rows": measured(pipe, rows, number)})
        append_row(raw, done[-1])
        print(number, {name: row.get("psnr") for name, row in done[-1]["rows"].items()}, flush=True)
    text = (
        f"{environment_line()}, one thread. Made by `benchmarks/{name}.py`.\n\n"
        f"The built-in model, {FRAMES} frames of 128x128, {STEPS} steps, on {len(done)} held-out prompts, from the "
        "same seeds in each row. CPU-seconds are the median of whole videos with text and decoding, the ratio that of "
        "pairs; passes are those of the transformer that were computed, the mean. Right is how many videos show the "
        f"shape, colour and motion that their prompt says. {about}"
    )
    table = summarise(done, rows, plain)
    write_csv(out / f"{name}.csv", table)
    write_markdown(out / f"{name}.md", title, text, table)
