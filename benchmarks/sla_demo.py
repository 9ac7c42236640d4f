"""SLA on the built-in Wan model: what training with few key blocks brings back, beside what needs no training.

    python benchmarks/sla_demo.py --steps 5000 --decay 1000 --prompts 64 --processes 2
    python benchmarks/sla_demo.py --blocks 2 --start runs/sla_demo --work runs/sla_demo_2 --steps 600 --decay 150
    python benchmarks/sla_demo.py --blocks 4 --block 16 --work runs/sla_demo_16 --steps 3200 --decay 1000
    python benchmarks/sla_demo.py --blocks 4 --block 16 --work runs/sla_demo_16 --steps 8000 --decay 2000

Trains with the ready settings `demo_sla` in two arms, with linear attention over all keys and with block-sparse
attention alone, in turn and equally long (a call goes on where the last one stopped; the learning rate falls in the
last steps). Then it makes the videos of held-out prompts with dense attention, with both arms, with the same blocks
untrained, and with Tangent at the same density, from the same seeds. The second line goes on from there with twice the
blocks; the third begins anew with as much of the keys in blocks of half the size, and the fourth goes on. Results go to
`benchmarks/results/sla_demo*`, one section for each number of blocks; with `--untrained` the rows that need no training
are measured anew, and the others stay.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
import yaml
from common import RESULTS, environment_line, read_rows, write_markdown
from prompts import Made, make, psnr

ARMS = {"all": "SLA, linear attention over all keys", "none": "block-sparse alone"}
TOKENS = 576
UNTRAINED = DENSE, BLOCKS, TANGENT = "dense", "block-sparse, untrained", "Tangent, untrained"


class Reads(NamedTuple):
    """What a query block reads: so many key blocks of so many tokens, queries in blocks of as many."""

    blocks: int
    block: int

    @property
    def there(self) -> int:
        """Key blocks of the model's sequence."""
        return TOKENS // self.block

    @property
    def share(self) -> float:
        """Of the key blocks, no less."""
        return math.ceil(1e4 * self.blocks / self.there) / 1e4

    def __str__(self) -> str:
        return f"{self.blocks} of {self.there}"


def train(
    work: Path, cache: Path, reads: Reads, start: Path | None, steps: int, decay: int, piece: int
) -> dict[str, Path]:
    """The folders of the trained pipelines; both arms go on in turn, so that they are equally long wherever it ends."""
    from vidaccel.lora import config_folder, run

    found = {}
    for upto in [*range(piece, steps - decay, piece), steps]:
        for arm in ARMS:
            changes = [f"out={work / f'sla_{arm}'}", f"data.cache={cache}", f"sla.linear_scope={arm}"]
            changes += [f"train.steps={upto}", f"train.lr_decay_steps={decay if upto == steps else 0}"]
            changes += [f"sla.topk={reads.share}", f"sla.block_q={reads.block}", f"sla.block_k={reads.block}"]
            changes += ["loop.tracker=none"]
            if start is not None:
                changes.append(f"sla.start={start / f'sla_{arm}' / 'pipeline'}")
            if _last(work / f"sla_{arm}").get("step", 0) < upto or upto == steps:
                found[arm] = Path(run("sla", config_folder() / "demo_sla.yaml", changes, resume="auto")["pipeline"])
    return found


def _last(run: Path) -> dict:
    """The last row of a run's log; an empty one without any."""
    return next(reversed(read_rows(run / "log.jsonl")), {})


def learned(runs: dict[str, Path]) -> list[dict]:
    """The error of the velocity against that of dense attention, as a share of its square, at each validated step."""
    rows: dict[int, dict] = {}
    for arm, folder in runs.items():
        for line in read_rows(folder / "log.jsonl"):
            if "validation_off_dense" in line:
                rows.setdefault(line["step"], {"step": line["step"]} | dict.fromkeys(ARMS.values(), ""))
                rows[line["step"]][ARMS[arm]] = f"{line['validation_off_dense']:.4f}"
    return [rows[step] for step in sorted(rows)]


def videos(name: str, arm: Path | None, reads: Reads, count: int, steps: int, scale: float) -> tuple[float, list[Made]]:
    """The density and the videos of a kind of attention: one without training, or an arm, with its transformer."""
    import torch
    from diffusers import WanPipeline, WanTransformer3DModel

    import vidaccel
    from vidaccel import SLA, DenseSchedule, Tangent, demo

    torch.set_num_threads(1)
    prompts = tuple(demo.HELD_OUT_PROMPTS[i * len(demo.HELD_OUT_PROMPTS) // count] for i in range(count))
    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    method: Any = None
    if arm is not None:
        pipe.register_modules(transformer=WanTransformer3DModel.from_pretrained(arm))
        method = "sla"
    elif name == BLOCKS:
        method = SLA(topk=reads.share, block=(reads.block, reads.block), linear_scope="none")
    elif name == TANGENT:
        # As many clusters as leave half of so low a density for pairs.
        method = Tangent(density=reads.blocks / reads.there, q_clusters=32, k_clusters=16, schedule=DenseSchedule())
    handle = None if method is None else vidaccel.accelerate(pipe, method)
    with contextlib.nullcontext() if handle is None else handle:
        made = [make(pipe, prompt, seed, 33, steps, scale) for seed, prompt in enumerate(prompts)]
        return 1.0 if handle is None else handle.report().mean_density(), made


def compare(arms: dict[str, Path], reads: Reads, count: int, steps: int, scale: float, processes: int) -> list[dict]:
    """A row for each kind of attention: how near its videos are to the dense ones, and how many are right."""
    kinds: list[tuple[str, Path | None]] = [(name, None) for name in UNTRAINED]
    kinds += [(f"{ARMS[arm]}, trained", folder) for arm, folder in arms.items()]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(videos, *kind, reads, count, steps, scale) for kind in kinds]
        found = [each.result() for each in pending]
    dense, rows = found[0][1], []
    for (name, _), (density, made) in zip(kinds, found, strict=True):
        near = [psnr(one.video, other.video) for one, other in zip(made, dense, strict=True)]
        spread = f" ± {statistics.stdev(near):.1f}" if count > 1 else ""
        right = {part: f"{sum(one.right[part] for one in made)} of {count}" for part in ("shape", "motion", "all")}
        rows.append(
            {
                "attention": name,
                "density": f"{density:.3f}",
                "PSNR to dense, dB": "" if name == DENSE else f"{statistics.fmean(near):.1f}{spread}",
                "shape right": right["shape"],
                "motion right": right["motion"],
                "all right": right["all"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def main(
    blocks: Annotated[int, typer.Option(min=1, help="Key blocks that each query block reads.")] = 1,
    block: Annotated[int, typer.Option(help="Tokens of a block, of which the 576 are made up.")] = 32,
    start: Annotated[
        Path | None, typer.Option(help="The --work of an earlier call, whose arms are gone on from.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the training of each arm, over all calls.")] = 2000,
    decay: Annotated[int, typer.Option(min=0, help="The last of these steps, in which the rate falls.")] = 400,
    piece: Annotated[int, typer.Option(min=1, help="Steps of an arm before the other goes on.")] = 200,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="ARM=FOLDER, that of a run: what it made is measured, and nothing is trained."),
    ] = None,
    untrained: Annotated[
        bool,
        typer.Option(
            help="Measure the rows that need no training anew, as the file of results says, and train nothing."
        ),
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 8,
    denoising_steps: Annotated[int, typer.Option(min=2, help="Of each video.")] = 10,
    guidance_scale: Annotated[float, typer.Option(min=1)] = 2.0,
    processes: Annotated[int, typer.Option(min=1, help="That make videos; of one thread each.")] = 1,
    work: Annotated[Path, typer.Option(help="Folder of the runs, used again where it is there.")] = Path(
        "runs/sla_demo"
    ),
    cache: Annotated[Path | None, typer.Option(help="Of encoded clips; below `work` by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Train and measure, and write sla_demo.md and sla_demo.json."""
    import torch

    torch.set_num_threads(1)
    file = out / "sla_demo.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if block < 1 or TOKENS % block:
        raise typer.BadParameter(f"{block} does not divide {TOKENS}: give 16, 32 or 64.", param_hint="--block")
    reads = Reads(blocks, block)
    if blocks >= reads.there:
        raise typer.BadParameter(f"{reads} blocks leave none out: give fewer.", param_hint="--blocks")
    if untrained:
        if str(reads) not in found:
            raise typer.BadParameter(f"{file} has no rows of {reads} blocks: leave it out.", param_hint="--untrained")
        known = found[str(reads)]
        rows = compare({}, reads, known["prompts"], known["denoising_steps"], known["guidance_scale"], processes)
        known["videos"][: len(rows)] = rows
        known["untrained_environment"] = environment_line()
        _write(out, found)
        return
    if decay >= steps:
        raise typer.BadParameter(f"{decay} of {steps} steps: leave some at the full rate.", param_hint="--decay")
    if arm:
        given = dict(text.split("=", 1) for text in arm)
        runs = {name: Path(given[name]) for name in ARMS if name in given}
    else:
        trained = train(work, cache or work / "cache", reads, start, steps, decay, piece)
        runs = {name: folder.parent for name, folder in trained.items()}
    arms = {name: folder / "pipeline" / "transformer" for name, folder in runs.items()}
    rows = compare(arms, reads, prompts, denoising_steps, guidance_scale, processes)
    done = {name: _last(folder).get("step", 0) for name, folder in runs.items()}
    facts = {"environment": environment_line(), "steps": done}
    facts |= {"prompts": prompts, "denoising_steps": denoising_steps, "guidance_scale": guidance_scale}
    facts["went_on"] = start is not None or any(_starts(folder) for folder in runs.values())
    found[str(reads)] = {**facts, "learned": learned(runs), "videos": rows}
    _write(out, found)


def _write(out: Path, found: dict[str, Any]) -> None:
    """sla_demo.json and sla_demo.md."""
    out.mkdir(parents=True, exist_ok=True)
    in_order = {reads: found[reads] for reads in sorted(found, key=_numbers)}
    (out / "sla_demo.json").write_text(json.dumps(in_order, indent=1) + "\n")
    write_page(out)


def _numbers(reads: str) -> tuple[int, int]:
    """How many blocks there are, and how many of them are read, of the text of a `Reads`."""
    blocks, there = map(int, reads.split(" of "))
    return there, blocks


def _starts(run: Path) -> bool:
    """Whether a run went on from another one."""
    config = run / "config.yaml"
    return config.is_file() and yaml.safe_load(config.read_text())["sla"].get("start") is not None


def write_page(out: Path) -> None:
    """sla_demo.md from sla_demo.json."""
    sections = json.loads((out / "sla_demo.json").read_text())
    text, tables = "Made by `benchmarks/sla_demo.py`. ± is the standard deviation over videos.", []
    for reads, found in sections.items():
        there, blocks = _numbers(reads)
        both = " Both arms have seen the same clips, noise and levels at each step." if len(found["steps"]) > 1 else ""
        steps = " and ".join(f"{number:,}" for number in sorted(set(found["steps"].values())))
        before = ", went on from the arms with fewer blocks" if found["went_on"] else ""
        before += f", {found['rate']}" if "rate" in found else ""  # by hand, where it did not fall once
        text += (
            f"\n\n**{reads} key blocks of {TOKENS // there} tokens** in every layer and step of the built-in Wan "
            f"model, {100 - 100 * blocks / there:.1f} % sparse. One table has the videos of "
            f"{found['prompts']} held-out prompts with {found['denoising_steps']} steps, guidance "
            f"{found['guidance_scale']:g} and the same seeds in each row: how near they are to those "
            "of dense attention, and how many show what their prompt says. "
            f"The training had {steps} steps of 4 clips{before}; its weights are averages (EMA). Another "
            "table has the error of the velocity on held-out clips against the dense model's, as a share of its "
            f"square.{both} {found['environment']}, one thread, on a machine with other work."
        )
        if (later := found.get("untrained_environment")) is not None:
            text += f" The rows that need no training were measured later: {later}."
        tables += [table for table in (found["videos"], found["learned"]) if table]
    write_markdown(out / "sla_demo.md", "SLA on the built-in model", text, *tables)


if __name__ == "__main__":
    typer.run(main)
