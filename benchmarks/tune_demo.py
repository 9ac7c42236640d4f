"""What `vidaccel tune` finds on the built-in model with 8 prompts, held against fixed defaults on 56 others.

    python benchmarks/tune_demo.py                 # hours on a CPU; call it again to go on
    python benchmarks/tune_demo.py --prompts 8     # fewer of the others

For each fixed default (a cache or a method of sparse attention with nothing set), its PSNR on 8 of the 64 held-out
prompts is the budget of a `tune` on the same 8: that of the mean squared error, and where some of its videos are dense
to the bit, that of the mean over the videos as well, in which these count as `SAME` dB. Then the other prompts are made
dense, with each default and with each preset that was found, from one seed and one after the other in one process and
on one thread. Seconds are CPU-seconds of the thread for whole videos, decoding included, so that other work on the
machine is in none of them. Results go to `benchmarks/results/tune_demo*`; what was measured so far, to the folder of
`--work`.
"""

from __future__ import annotations

import json
import logging
import math
import random
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, append_row, environment_line, read_rows, write_markdown

SAME = 100.0
"""PSNR that a video counts with that is dense to the bit, in dB."""


def prompts_of() -> tuple[list[int], list[int]]:
    """Numbers of the held-out prompts that are tuned on, evenly spread, and of the others in a fixed random order."""
    tuned_on = list(range(0, 64, 8))
    others = [number for number in range(64) if number not in tuned_on]
    random.Random(0).shuffle(others)
    return tuned_on, others


def defaults(ratios: list[float]) -> dict[str, Any]:
    """The fixed defaults, by name."""
    from vidaccel import Tangent
    from vidaccel.generation.tuning.space import Candidate, SparseLever
    from vidaccel.pipelines.presets import Cache

    return {
        "forecast": Candidate(cache=Cache("forecast")),
        "first_block": Candidate(cache=Cache("first_block")),
        "magcache": Candidate(cache=Cache("magcache", settings={"mag_ratios": ratios})),
        "seacache": Candidate(cache=Cache("seacache")),
        "tangent": Candidate(sparse=SparseLever(Tangent())),
    }


def find(work: Path, confirm: int, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Default, and which of its PSNRs where it has two -> its preset, that PSNR, and the preset found within it.

    Args:
        work: folder of what is known. confirm: see `tune`. found: by an earlier call, which is gone on with.
    """
    from vidaccel import demo
    from vidaccel.generation.run import load
    from vidaccel.generation.tuning.api import bench_of, carried_out
    from vidaccel.generation.tuning.budget import Budget
    from vidaccel.generation.tuning.plan import journal_of, planned
    from vidaccel.generation.tuning.space import CACHES, METHODS

    numbers, _ = prompts_of()
    texts = [demo.HELD_OUT_PROMPTS[number] for number in numbers]

    def plan(psnr: float) -> Any:
        return planned(
            demo.WAN,
            texts,
            numbers,
            out=work / "tune",
            budget=Budget(min_psnr=psnr),
            levers=("sparse", "cache", "guidance", "compile"),
            methods=METHODS,
            caches=[name for name in CACHES if name != "cache_dit"],
            effort="normal",
            confirm=confirm,
            settings={},
            placing={"device": "cpu"},
        )

    first = plan(30.0)
    pipe = load(first.job.facts, first.job.dtype, first.job.device)
    bench = bench_of(first, pipe, journal_of(first), lambda *told: print(*told, flush=True), time.thread_time)
    bench.dense(6)
    for name, candidate in defaults(bench.ratios()).items():
        own = bench.confirm(candidate)
        budgets = {name: own.mean_psnr}
        if math.inf in own.psnr:
            budgets[f"{name}, mean of the videos"] = statistics.fmean(min(value, SAME) for value in own.psnr)
        for budget, psnr in budgets.items():
            if budget in found:
                continue
            # Rounded down to a tenth of a dB: a budget that the default itself is within.
            made = carried_out(plan(int(10 * psnr) / 10), progress=False, clock=time.thread_time)
            print(budget, f"{psnr:.2f} dB:", made.in_words(), flush=True)
            found[budget] = {
                "of": name,
                "default": candidate.preset().to_dict(),
                "psnr": psnr,
                "ratio": own.ratio,
                "tuned": None if made.preset is None else made.preset.to_dict(),
                "tuned_label": "dense" if made.preset is None else made.chosen.candidate.label,
                "outcome": made.outcome,
            }
            (work / "found.json").write_text(json.dumps(found, indent=1) + "\n")
    (work / "all").touch()
    return found


def measure(work: Path, found: dict[str, dict[str, Any]], count: int) -> dict[str, list[dict[str, Any]]]:
    """Row -> of each prompt its PSNR, CPU-seconds, and passes."""
    from vidaccel import Preset, apply, demo
    from vidaccel.generation.models.inspected import inspect_model
    from vidaccel.generation.report.comparison import compare
    from vidaccel.generation.requests.settings import Settings
    from vidaccel.generation.run import run, warm_up
    from vidaccel.generation.tuning.trajectory import as_bytes

    rows: dict[str, Any] = {"dense": Preset(name="dense")}
    for each in found.values():
        rows[each["of"]] = Preset.from_dict(each["default"])
        if each["tuned"] is not None:
            rows[each["tuned_label"]] = Preset.from_dict(each["tuned"])
    file = work / "videos.jsonl"
    done = {(line["prompt"], line["row"]): line for line in read_rows(file, to_append=True)}
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    facts = inspect_model(demo.WAN)
    others = prompts_of()[1][:count]
    for number in others:
        if all((number, row) in done for row in rows):
            continue
        settings = Settings(demo.HELD_OUT_PROMPTS[number], seed=number).checked(facts)
        reference = None
        for row, preset in rows.items():
            if (number, row) in done and row != "dense":
                continue
            with apply(pipe, preset, base=demo.path()) as handle:
                if preset.method is not None or preset.compile is not None:
                    warm_up(pipe, settings, None)
                    handle.reset()
                begin = time.thread_time()
                frames = as_bytes(run(pipe, settings).frames)
                seconds = time.thread_time() - begin
                counts = handle.report().counts()
            if reference is None:
                reference = frames
            line = {
                "prompt": number,
                "row": row,
                "seconds": round(seconds, 3),
                "psnr": None if row == "dense" else round(min(compare(reference, frames).mean_psnr, SAME), 3),
                "computed": counts["computed"],
                "forwards": counts["forwards"],
            }
            append_row(file, line)
            done[number, row] = line
        print("prompt", number, flush=True)
    whole = [number for number in others if all((number, row) in done for row in rows)]
    return {row: [done[number, row] for number in whole] for row in rows}


def interval(differences: list[float]) -> str:
    """The mean of paired differences, and twice its standard error."""
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return f"{statistics.fmean(differences):+.2f} ± {2 * error:.2f}"


def of_mean_error(rows: list[dict[str, Any]]) -> str:
    """The PSNR of the mean squared error: some videos to the bit as dense, which count as 100 dB, do not carry it."""
    from vidaccel.generation.report import decibel

    return f"{decibel.of_mean_error(row['psnr'] for row in rows):.1f}"


def table(found: dict[str, dict[str, Any]], measured: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each default, with what was found beside it, paired by prompt."""

    def share(of: list[dict[str, Any]], to: list[dict[str, Any]]) -> str:
        return f"{statistics.median(x['seconds'] / y['seconds'] for x, y in zip(of, to, strict=True)):.2f}"

    rows, dense = [], measured["dense"]
    for name, each in found.items():
        label = each["tuned_label"] if each["tuned"] is not None else "dense"
        own, its = measured[each["of"]], measured[label]
        same = label == "dense"
        gained = [] if same else [y["psnr"] - x["psnr"] for x, y in zip(own, its, strict=True)]
        faster = sum(y["seconds"] < x["seconds"] for x, y in zip(own, its, strict=True))
        rows.append(
            {
                "fixed default": name,
                "its PSNR (8 prompts)": f"{each['psnr']:.1f}",
                "found within that": label,
                "prompts": len(own),
                "default: of dense": share(own, dense),
                "found: of dense": share(its, dense),
                "found / default": share(its, own),
                "faster on": f"{faster} of {len(own)}",
                "PSNR, default": f"{statistics.fmean(x['psnr'] for x in own):.1f}",
                "PSNR, found": "identical" if same else f"{statistics.fmean(y['psnr'] for y in its):.1f}",
                "of the mean error, default": of_mean_error(own),
                "of the mean error, found": "identical" if same else of_mean_error(its),
                "difference": "–" if same else interval(gained),
                "passes, default": round(statistics.fmean(x["computed"] for x in own), 1),
                "passes, found": round(statistics.fmean(y["computed"] for y in its), 1),
            }
        )
    return rows


def main(
    prompts: Annotated[int, typer.Option(min=2, max=56, help="Of the others.")] = 56,
    confirm: Annotated[int, typer.Option(min=1, help="Candidates of each budget that videos are made with.")] = 6,
    work: Annotated[Path, typer.Option(help="Folder of what was measured so far.")] = Path("runs/tune_demo"),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Tune and measure, and write tune_demo.md and tune_demo.json."""
    import torch

    logging.getLogger("vidaccel").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "found.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if not (work / "all").exists():
        found = find(work, confirm, found)
    measured = measure(work, found, prompts)
    rows = table(found, measured)
    content = {"environment": environment_line(), "found": found, "videos": measured}
    out.mkdir(parents=True, exist_ok=True)
    (out / "tune_demo.json").write_text(json.dumps(content, indent=1) + "\n")
    text = (
        f"{content['environment']}. Made by `python benchmarks/tune_demo.py`.\n\n"
        "The built-in model, 33 frames of 128x128 (576 tokens), 20 steps. The PSNR of each fixed default on 8 prompts, "
        "of their mean squared error, is the budget of a `vidaccel tune` on these; where some of its videos are dense "
        f"to the bit, so is the mean of the PSNRs, in which these count as {SAME:g} dB. What it found is held against "
        f"the default on {len(measured['dense'])} other prompts. Seconds are CPU-seconds of one thread for a whole "
        "video, decoding included and compilation not: the median over prompts of the ratio to the dense video, or to "
        "the default. Differences of PSNR (dB) are paired by prompt, the mean and twice its standard error; *of the "
        "mean error* is the PSNR of the mean squared error. Passes are those of the transformer that were computed, of "
        f"{measured['dense'][0]['forwards']}. Sparse attention is slower than dense at this length."
    )
    write_markdown(out / "tune_demo.md", "What tune finds, against fixed defaults", text, rows)


if __name__ == "__main__":
    typer.run(main)
