"""A few CPU figures, one line a run, and a word when one got worse by more than the noise.

    python benchmarks/track.py

Steps of the built-in model at 2,112 tokens (dense, and each of a few methods as a share of dense), and decoding; all in
one process on one thread, taking turns. A line with machine, versions and commit is appended to
`benchmarks/results/track.jsonl` and compared with the earlier lines of the same machine. Ends with 1 when a figure is
above its bound, else 0.

**The bound.** The noise of a run is the spread of its own repeats: their median absolute deviation, made a standard
deviation (times 1.4826) of the median's size. The noise of a comparison is that of this run, the largest of the earlier
runs, and the spread of the earlier runs' medians, in squares. A figure may be 3 times that above the median of the
earlier runs, and never less than 2 %. Runs that were above are no measure for later ones, unless `--accept` says that
the new figures are as they should be: then later runs are compared with this one and those after it.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS

FILE = RESULTS / "track.jsonl"
METHODS = ("radial", "sparge", "svg2", "tangent")
DENSITY, FRAMES, PIXELS = 0.2, 129, 128  # 33 x 8 x 8 tokens
MACHINE = ("system", "CPU", "device")  # of `environment`: where these differ, figures are not compared
DEVIATIONS, LEAST = 3.0, 0.02


class TrackError(ValueError):
    """A file of figures that cannot be read."""


@dataclass(frozen=True)
class Verdict:
    """One figure beside what it was.

    Args:
        value: median of this run. baseline: median of the earlier runs, None where there is none.
        bound: largest value that is no regression. runs: how many earlier ones.
    """

    value: float
    baseline: float | None = None
    bound: float | None = None
    runs: int = 0

    @property
    def is_worse(self) -> bool:
        return self.bound is not None and self.value > self.bound


def noise(repeats: Sequence[float]) -> float:
    """Standard deviation of repeats relative to their median, from the median absolute deviation."""
    middle = statistics.median(repeats)
    return 1.4826 * statistics.median(abs(value - middle) for value in repeats) / middle


def judge(repeats: Sequence[float], earlier: Sequence[Sequence[float]]) -> Verdict:
    """A figure, of which less is better, against the repeats of each of the earlier runs."""
    value = statistics.median(repeats)
    if not earlier:
        return Verdict(value)
    medians = [statistics.median(run) for run in earlier]
    baseline = statistics.median(medians)
    between = statistics.pstdev(medians) / baseline
    together = math.hypot(noise(repeats), max(map(noise, earlier)), between)
    return Verdict(value, baseline, baseline * (1 + max(LEAST, DEVIATIONS * together)), len(earlier))


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of figures; none where there is no file."""
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise TrackError(f"{file}:{number} is no JSON ({error}): delete that line") from error
    return found


def comparable(lines: Sequence[Mapping[str, Any]], environment: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The earlier runs of this machine that are a measure for a new one."""
    same = [line for line in lines if all(line["environment"].get(k) == environment.get(k) for k in MACHINE)]
    for number in range(len(same) - 1, -1, -1):
        if same[number]["accepted"]:
            same = same[number:]
            break
    return [line for line in same if line["accepted"] or not line["worse"]]


def track(
    figures: Mapping[str, Sequence[float]],
    environment: Mapping[str, str],
    commit: str,
    file: Path,
    accept: bool = False,
) -> dict[str, Verdict]:
    """Compare figures with the earlier ones of a file, and append them to it.

    Args:
        figures: name, with its unit, -> repeats. accept: later runs are compared with these, whatever they are.
    """
    earlier = comparable(read(file), environment)
    verdicts = {}
    for name, repeats in figures.items():
        verdicts[name] = judge(repeats, [line["figures"][name] for line in earlier if name in line["figures"]])
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "accepted": accept,
        "worse": [name for name, verdict in verdicts.items() if verdict.is_worse],
        "environment": dict(environment),
        "figures": {name: [float(f"{value:.4g}") for value in repeats] for name, repeats in figures.items()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line, ensure_ascii=False) + "\n")
    return verdicts


def commit_of(root: Path) -> str:
    """The commit of a checkout, with `+` where files differ from it; "unknown" outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def workloads(frames: int, methods: Sequence[str]) -> dict[str, Callable[[], object]]:
    """What is timed: steps of the transformer by method, and decoding."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from vidaccel import AutoencoderDCV, DenseSchedule, VideoLayout, accelerate, demo
    from vidaccel.generation.showcase.step_times import quick_method

    layout = VideoLayout((frames - 1) // 4 + 1, PIXELS // 16, PIXELS // 16)
    transformer = WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer").eval()
    generator = torch.Generator().manual_seed(0)
    channels, size = transformer.config.in_channels, (layout.frames, 2 * layout.height, 2 * layout.width)
    latents = torch.randn(1, channels, *size, generator=generator)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)

    def steps(name: str) -> Callable[[], object]:
        schedule = DenseSchedule(first_steps=10**6) if name == "dense" else None
        method = quick_method("radial" if name == "dense" else name, layout, DENSITY)

        def run() -> None:
            with accelerate(transformer, method, schedule=schedule):
                for number in range(2):  # the first makes a plan
                    transformer(latents, torch.tensor([900.0 - number]), text)

        return run

    wan = AutoencoderKLWan.from_pretrained(demo.path(), subfolder="vae").eval()
    deep = AutoencoderDCV.from_pretrained(demo.path("demo-dc"), subfolder="vae").eval()
    short = torch.randn(1, wan.config.z_dim, 3, PIXELS // 8, PIXELS // 8, generator=generator)
    side = PIXELS // deep.spatial_compression_ratio
    deep_latents = torch.randn(1, deep.config.latent_channels, 4, side, side, generator=generator)
    return {
        **{f"{name}, two steps, s": steps(name) for name in ("dense", *methods)},
        "decoding 9 frames, s": lambda: wan.decode(short),
        "decoding 16 frames of demo-dc, s": lambda: deep.decode(deep_latents),
    }


def measure(frames: int, methods: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of each workload by turns, after one uncounted turn, and the methods as shares of dense in their turn."""
    import torch

    found = workloads(frames, methods)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, run in found.items():
                start = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    dense = seconds["dense, two steps, s"]
    shares = {}
    for name in methods:
        shares[f"{name}, of dense"] = [a / b for a, b in zip(seconds[f"{name}, two steps, s"], dense, strict=True)]
    return seconds | shares


def main(
    repeats: Annotated[int, typer.Option(min=3, help="Turns; the spread of them is the noise.")] = 7,
    frames: Annotated[int, typer.Option(min=5, help="Frames of the video, 4k+1.")] = FRAMES,
    methods: Annotated[str, typer.Option(help="Methods that are measured, with commas between.")] = ",".join(METHODS),
    accept: Annotated[
        bool, typer.Option("--accept", help="These figures are what later runs are compared with.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The file to append to.")] = FILE,
) -> None:
    """Measure, append, compare."""
    import torch

    from vidaccel.generation.machine import environment

    read(out)  # before the work, whatever is wrong with it
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    # Sizes belong to the name of a figure, so that those of another size are not compared.
    figures = measure(frames, methods.split(","), repeats)
    if frames != FRAMES:
        figures = {f"{name} ({frames} frames)": values for name, values in figures.items()}
    verdicts = track(figures, facts, commit_of(Path(__file__).parents[1]), out, accept)
    for name, verdict in verdicts.items():
        if verdict.baseline is None:
            print(f"{name}: {verdict.value:.4g}, nothing to compare with on this machine")
            continue
        word = "WORSE" if verdict.is_worse else "within"
        print(
            f"{name}: {verdict.value:.4g}, {word}: {verdict.baseline:.4g} in {verdict.runs} earlier "
            f"run{'s' if verdict.runs != 1 else ''}, bound {verdict.bound:.4g} "
            f"(+{verdict.bound / verdict.baseline - 1:.0%})"
        )
    if any(verdict.is_worse for verdict in verdicts.values()) and not accept:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
