"""Few steps on the built-in models: accuracy on 64 prompts from guidance in two passes to a distilled model.

    python benchmarks/few_steps_demo.py                                  # the shipped adapters: an hour on a CPU
    python benchmarks/few_steps_demo.py --few-steps runs/demo_dc_consistency/adapter

Each way makes each held-out prompt once, from the prompt's own seed: whether the video shows all that the prompt says,
how far it is from that of 20 steps of the same model with guidance in two passes, and CPU-seconds. Results go to
`benchmarks/results/few_steps_demo*`, and the accuracies, with that of the plain model of `dc_demo.py`, to
`demo/accuracy.json`, which `vidaccel demo` quotes. A run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, append_row, environment_line, read_rows, write_csv, write_markdown
from gft_demo import MODELS, loaded, made

UNTRAINED = (20, 6, 4, 2)
"""Steps of the guidance-free model with its own sampler."""
EULER = (4,)
"""Steps of the same model at the levels that the distilled ones have, in Euler's steps."""
SCALE = 2.0
RIGHT = ("shape", "colour", "motion", "background", "all")


@dataclass(frozen=True)
class Way:
    """One way to make a video.

    Args:
        model: built-in one.
        guidance: "two passes" or "one pass".
        steps: of the sampler.
        sampler: "own", "euler" (at the levels of the training) or "distilled".
        adapter: of the guidance; None for two passes.
    """

    model: str
    guidance: str
    steps: int
    sampler: str
    adapter: Path | None = field(default=None)

    @property
    def digest(self) -> str:
        """Of the adapter's file."""
        from vidaccel.generation.showcase.measured import file_digest

        return "" if self.adapter is None else file_digest(self.adapter)

    @property
    def key(self) -> str:
        return " ".join(filter(None, (self.model, self.guidance, str(self.steps), self.sampler, self.digest)))


def ways(guidance_free: Path, few: list[Path]) -> list[Way]:
    """All that is compared; that of which distances are told comes first."""
    from vidaccel import demo
    from vidaccel.pipelines.guidance_free import read_adapter

    found = [Way(demo.DC, "two passes", 20, "own")]
    found += [Way(demo.DC, "one pass", steps, "own", guidance_free) for steps in UNTRAINED]
    for file in few:
        found.append(Way(demo.DC, "one pass", len(read_adapter(file).sigmas), "distilled", file))
    return found + [Way(demo.DC, "one pass", steps, "euler", guidance_free) for steps in EULER]


def distance(video: Any, reference: Path) -> float:
    """PSNR in dB to the kept video of another way."""
    import numpy as np

    error = float(((video - np.load(reference)["video"] / 255.0) ** 2).mean())
    return -10 * float(np.log10(max(1e-10, error)))


def rows_of(way: Way, numbers: list[int], reference: Path, keep: bool) -> Iterator[dict[str, Any]]:
    """The rows of a way, one at a time.

    Args:
        numbers: of the prompts.
        reference: folder of the videos of which distances are told.
        keep: this is the way that makes them.
    """
    import contextlib

    import numpy as np
    import torch
    from diffusers import UniPCMultistepScheduler

    import vidaccel
    from vidaccel import demo
    from vidaccel.demo.checker import check

    pipe = loaded(way.model)
    guided = contextlib.nullcontext() if way.adapter is None else vidaccel.guidance_free(pipe, way.adapter)
    with guided:
        if way.sampler == "euler":
            shift = pipe.scheduler.config.flow_shift
            levels = [1 - n / way.steps for n in range(way.steps)]
            pipe.scheduler = vidaccel.GridScheduler([shift * u / (1 + (shift - 1) * u) for u in levels])
        else:
            assert way.sampler == "distilled" or isinstance(pipe.scheduler, UniPCMultistepScheduler)
        for number in numbers:
            prompt = demo.HELD_OUT_PROMPTS[number]
            video, taken = made(pipe, MODELS[way.model][1], prompt, number, SCALE, way.steps)
            right = check(torch.from_numpy(video).permute(0, 3, 1, 2)).agrees_with(prompt)
            kept = reference / f"{number}.npz"
            if keep:
                np.savez_compressed(kept, video=(video * 255).round().astype(np.uint8))
            row = {"key": f"{way.key} {number}", "number": number, "seconds": taken["video"], "right": right}
            if way.model == demo.DC and not keep:
                row["psnr"] = distance(video, kept)
            yield row


def line_of(way: Way, found: list[dict]) -> dict[str, Any]:
    """What a table says of a way."""
    count = len(found)
    psnr = [row["psnr"] for row in found if "psnr" in row]
    return {
        "model": way.model,
        "guidance": way.guidance,
        "steps": way.steps,
        "sampler": way.sampler,
        "passes": way.steps * (2 if way.guidance == "two passes" else 1),
        **{name: f"{sum(row['right'][name] for row in found)} of {count}" for name in RIGHT},
        "PSNR, dB": f"{statistics.fmean(psnr):.1f}" if psnr else "",
        "lowest": f"{min(psnr):.1f}" if psnr else "",
        "CPU-s a video": f"{statistics.median(row['seconds'] for row in found):.2f}",
    }


def write(chosen: list[Way], done: dict[str, dict], prompts: int, out: Path, accuracy: Path) -> None:
    """The tables, and what `vidaccel demo` quotes."""
    whole = []
    for way in chosen:
        found = [row for n in range(prompts) if (row := done.get(f"{way.key} {n}"))]
        if len(found) == prompts:
            whole.append((way, found))
    if not whole:
        return
    whole.sort(key=lambda pair: (pair[0].guidance != "two passes", pair[0].sampler == "distilled"))
    lines = [line_of(way, found) for way, found in whole]
    write_csv(out / "few_steps_demo.csv", lines)
    write_markdown(
        out / "few_steps_demo.md",
        "Few steps on the built-in models",
        f"`python benchmarks/few_steps_demo.py`; {environment_line()}, one thread, on a machine with other work.\n\n"
        f"{prompts} held-out prompts, each from its own seed, guidance {SCALE:g}. `own` is the sampler of the model "
        "(UniPC), `euler` the levels of the distilled model without its training, `distilled` an adapter of the recipe "
        "`consistency`. PSNR is to the videos of 20 steps in two passes of demo-dc. CPU-seconds are the median of "
        "a whole call, text and decoding included.",
        lines,
    )
    told = [
        {
            "model": way.model,
            "steps": way.steps,
            "guidance_scale": SCALE,
            "adapter": way.digest,
            "right": sum(row["right"]["all"] for row in found),
            "prompts": prompts,
        }
        for way, found in whole
        if way.sampler != "euler"
    ]
    plain = next(
        row for row in json.loads((RESULTS / "dc_demo.json").read_text())["accuracy"] if row["model"] == "demo"
    )
    right = round(plain["prompts"] * int(plain["all"].removesuffix("%")) / 100)
    base = {"model": "demo", "steps": 20, "guidance_scale": SCALE, "adapter": "", "right": right}
    told.insert(0, {**base, "prompts": plain["prompts"]})
    stated = {
        "made_by": "benchmarks/few_steps_demo.py; that of demo: dc_demo.py",
        "checker": "shape, colour and motion",
    }
    accuracy.write_text(json.dumps({**stated, "rows": told}, indent=1) + "\n")


def main(
    guidance_free: Annotated[Path | None, typer.Option(help="Adapter of gft for demo-dc; else its own.")] = None,
    few_steps: Annotated[list[Path] | None, typer.Option(help="Adapters of consistency; else the shipped.")] = None,
    prompts: int = 64,
    out: Path = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of the videos that distances are told of.")] = Path(
        "runs/few_steps_demo"
    ),
    accuracy: Annotated[Path | None, typer.Option(help="What vidaccel demo quotes; else that of the package.")] = None,
    only: Annotated[str, typer.Option(help="Ways whose name begins so.")] = "",
) -> None:
    """Make what is missing of the rows, and write the tables."""
    import torch

    from vidaccel import demo
    from vidaccel.pipelines.guidance_free import read_adapter
    from vidaccel.pipelines.guidance_free.adapter_file import OWN_FILE

    torch.set_num_threads(1)
    own = demo.path(demo.DC) / "transformer" / OWN_FILE
    few = [read_adapter(place).path for place in (demo.few_steps() if few_steps is None else few_steps)]
    chosen = ways(own if guidance_free is None else read_adapter(guidance_free).path, few)
    out.mkdir(parents=True, exist_ok=True)
    raw = out / "few_steps_demo.jsonl"
    done = {row["key"]: row for row in read_rows(raw, to_append=True)}
    table = demo.path(demo.WAN).parent / "accuracy.json" if accuracy is None else accuracy
    reference = work / "two passes"
    reference.mkdir(parents=True, exist_ok=True)
    for number, way in enumerate(chosen):
        keep = number == 0
        missing = [
            n
            for n in range(prompts)
            if f"{way.key} {n}" not in done or (keep and not (reference / f"{n}.npz").is_file())
        ]
        if not missing or not way.key.startswith(only):
            continue
        for row in rows_of(way, missing, reference, keep):
            done[row["key"]] = row
            append_row(raw, row)
        print(way.key, line_of(way, [done[f"{way.key} {n}"] for n in range(prompts)]), flush=True)
        write(chosen, done, prompts, out, table)
    write(chosen, done, prompts, out, table)


if __name__ == "__main__":
    typer.run(main)
