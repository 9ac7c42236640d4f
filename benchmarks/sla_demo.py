"""SLA on the built-in Wan model: what training with 1 of 18 key blocks brings back, beside what needs no training.

    python benchmarks/sla_demo.py --steps 2000

Trains with the ready settings `demo_sla` in two arms, with linear attention over all keys and with block-sparse
attention alone, in turn and equally long (a call goes on where the last one stopped). Then it makes the videos of
held-out prompts with dense attention, with both arms, with the same blocks untrained, and with Tangent at the same
density, from the same seeds. Results go to `benchmarks/results/sla_demo*`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, environment_line, write_markdown
from prompts import make, psnr

ARMS = {"all": "SLA, linear attention over all keys", "none": "block-sparse alone"}
TRAINED_AT = {"topk": 0.0556, "block": (32, 32)}  # as in demo_sla: 1 of 18 key blocks of 576 tokens
DENSITY = 1 / 18


def train(work: Path, cache: Path, steps: int, piece: int) -> dict[str, Path]:
    """The folders of the trained pipelines; both arms go on in turn, so that they are equally long wherever it ends."""
    from vidaccel.lora import config_folder, run

    found = {}
    for upto in [*range(piece, steps, piece), steps]:
        for arm in ARMS:
            changes = [f"out={work / f'sla_{arm}'}", f"data.cache={cache}", f"sla.linear_scope={arm}"]
            changes += [f"train.steps={upto}", "loop.tracker=none"]
            if json.loads(_last(work / f"sla_{arm}")).get("step", 0) < upto or upto == steps:
                found[arm] = Path(run("sla", config_folder() / "demo_sla.yaml", changes, resume="auto")["pipeline"])
    return found


def _last(run: Path) -> str:
    """The last line of a run's log; "{}" without any."""
    log = run / "log.jsonl"
    return log.read_text().splitlines()[-1] if log.is_file() else "{}"


def learned(runs: dict[str, Path]) -> list[dict]:
    """The error of the velocity against that of dense attention, as a share of its square, at each validated step."""
    rows: dict[int, dict] = {}
    for arm, folder in runs.items():
        log = folder / "log.jsonl"
        for line in map(json.loads, log.read_text().splitlines() if log.is_file() else ()):
            if "validation_off_dense" in line:
                rows.setdefault(line["step"], {"step": line["step"]} | dict.fromkeys(ARMS.values(), ""))
                rows[line["step"]][ARMS[arm]] = f"{line['validation_off_dense']:.4f}"
    return [rows[step] for step in sorted(rows)]


def compare(arms: dict[str, Path], count: int, steps: int, scale: float) -> list[dict]:
    """A row for each kind of attention: how near its videos are to the dense ones, and how many are right."""
    from diffusers import WanPipeline, WanTransformer3DModel

    import vidaccel
    from vidaccel import SLA, DenseSchedule, Tangent, demo

    prompts = tuple(demo.HELD_OUT_PROMPTS[i * len(demo.HELD_OUT_PROMPTS) // count] for i in range(count))
    # As many clusters as leave half of so low a density for pairs.
    tangent = Tangent(density=DENSITY, q_clusters=32, k_clusters=16, schedule=DenseSchedule())
    untrained: dict[str, Any] = {
        "dense": None,
        "block-sparse, untrained": SLA(**TRAINED_AT, linear_scope="none"),
        "Tangent, untrained": tangent,
    }
    rows, dense = [], []
    for name in (*untrained, *arms):
        pipe = WanPipeline.from_pretrained(demo.path())
        pipe.set_progress_bar_config(disable=True)
        method = untrained.get(name)
        if name in arms:
            pipe.register_modules(transformer=WanTransformer3DModel.from_pretrained(arms[name]))
            method = "sla"
        handle = None if method is None else vidaccel.accelerate(pipe, method)
        with contextlib.nullcontext() if handle is None else handle:
            made = [make(pipe, prompt, seed, 33, steps, scale) for seed, prompt in enumerate(prompts)]
            density = 1.0 if handle is None else handle.report().mean_density()
        dense = dense or made
        near = [psnr(one.video, other.video) for one, other in zip(made, dense, strict=True)]
        rows.append(
            {
                "attention": f"{ARMS[name]}, trained" if name in arms else name,
                "density": f"{density:.3f}",
                "PSNR to dense, dB": "" if name == "dense" else f"{statistics.fmean(near):.1f}",
                "right": f"{sum(one.right['all'] for one in made)} of {count}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(
    steps: Annotated[int, typer.Option(min=1, help="Of the training of each arm, over all calls.")] = 2000,
    piece: Annotated[int, typer.Option(min=1, help="Steps of an arm before the other goes on.")] = 200,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="ARM=FOLDER, that of a trained transformer: it is measured, and nothing is trained."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 8,
    denoising_steps: Annotated[int, typer.Option(min=2, help="Of each video.")] = 10,
    guidance_scale: Annotated[float, typer.Option(min=1)] = 2.0,
    work: Annotated[Path, typer.Option(help="Folder of the runs, used again where it is there.")] = Path(
        "runs/sla_demo"
    ),
    cache: Annotated[Path | None, typer.Option(help="Of encoded clips; below `work` by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Train and measure, and write sla_demo.md and sla_demo.json."""
    import torch

    torch.set_num_threads(1)
    if arm:
        given = dict(text.split("=", 1) for text in arm)
        arms = {name: Path(given[name]) for name in ARMS if name in given}
        runs = {name: folder.parent for name, folder in arms.items()}
    else:
        trained = train(work, cache or work / "cache", steps, piece)
        arms = {name: folder / "transformer" for name, folder in trained.items()}
        runs = {name: folder.parent for name, folder in trained.items()}
    rows, progress = compare(arms, prompts, denoising_steps, guidance_scale), learned(runs)
    facts = {"environment": environment_line(), "arms": {name: folder.name for name, folder in arms.items()}}
    found = {**facts, "prompts": prompts, "denoising_steps": denoising_steps, "guidance_scale": guidance_scale}
    out.mkdir(parents=True, exist_ok=True)
    (out / "sla_demo.json").write_text(json.dumps({**found, "learned": progress, "videos": rows}, indent=1) + "\n")
    write_page(out)


def write_page(out: Path) -> None:
    """sla_demo.md from sla_demo.json."""
    found = json.loads((out / "sla_demo.json").read_text())
    both = " Both arms have seen the same clips, noise and levels at each step." if len(found["arms"]) > 1 else ""
    text = (
        f"{found['environment']}, one thread, on a machine with other work. Made by `benchmarks/sla_demo.py`.\n\n"
        f"The built-in Wan model with 1 of 18 key blocks of 32 tokens in every layer and step. The first table has the "
        f"videos of {found['prompts']} held-out prompts with {found['denoising_steps']} steps, guidance "
        f"{found['guidance_scale']:g} and the same seeds in each row: how near they are to those of dense attention, "
        "and how many show all that their prompt says. Trained ones are "
        f"{', '.join(f'{name} ({folder})' for name, folder in found['arms'].items())}. The second has the error of the "
        "velocity on held-out clips against the dense model's, as a share of its square, which is 0.2111 before the "
        f"training.{both}"
    )
    tables = [table for table in (found["videos"], found["learned"]) if table]
    write_markdown(out / "sla_demo.md", "SLA on the built-in model", text, *tables)


if __name__ == "__main__":
    typer.run(main)
