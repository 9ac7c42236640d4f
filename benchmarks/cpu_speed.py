"""What a method saves on the CPU: a step of the demo transformer, from short to long videos, and one call alone.

    python benchmarks/cpu_speed.py

33 frames of 128x128 pixels are 576 tokens, 129 frames of 256x256 are 8,448. Dense and every method are measured in one
process, taking turns, so that a slow minute of the machine hits all of them. Results go to
`benchmarks/results/cpu_speed.*`.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from common import RESULTS, environment_line, write_csv, write_markdown

if TYPE_CHECKING:
    from vidaccel import VideoLayout

METHODS = ("radial", "sparge", "svg", "svg2", "tangent")
VIDEOS = "33x128,65x128,129x128,129x192,129x256"  # frames x pixels of a side


def median(values: list[float]) -> str:
    """Median with the smallest and largest value, in milliseconds."""
    low, middle, high = (1000 * f(values) for f in (min, statistics.median, max))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def layouts_of(videos: str) -> list[VideoLayout]:
    """Of the demo transformer, for videos told as `VIDEOS`."""
    from vidaccel import VideoLayout

    sizes = [tuple(map(int, video.split("x"))) for video in videos.split(",")]
    return [VideoLayout((frames - 1) // 4 + 1, size // 16, size // 16) for frames, size in sizes]


def measure_steps(layout: VideoLayout, density: float, rounds: int, backend: str) -> tuple[list[dict], dict]:
    """Steps of the whole transformer: dense, then each method, `rounds` times in turns."""
    from diffusers import WanTransformer3DModel

    from vidaccel import demo
    from vidaccel.generation.showcase.step_times import StepTimes, quick_method, step_times, wan_inputs

    transformer = WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer").eval()
    methods = {"dense": None, **{name: quick_method(name, layout, density) for name in METHODS}}
    inputs = wan_inputs(transformer, layout)
    found: dict[str, list[StepTimes]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, times in step_times(transformer, inputs, methods, backend=backend).items():
            found[name].append(times)
    print(f"{layout.tokens} tokens measured", flush=True)
    seconds = {name: [t.seconds for t in times] for name, times in found.items()}
    attention = {name: [t.attention_seconds for t in times] for name, times in found.items()}
    planning = {name: [t.plan_seconds for t in times] for name, times in found.items()}
    facts = {name: (times[-1].density, times[-1].backend) for name, times in found.items()}

    rows, base = [], (statistics.median(seconds["dense"]), statistics.median(attention["dense"]))
    for name in seconds:
        step_s, attention_s = statistics.median(seconds[name]), statistics.median(attention[name])
        rows.append(
            {
                "tokens": layout.tokens,
                "method": name,
                "density": round(facts[name][0], 3),
                "backend": facts[name][1],
                "step ms": median(seconds[name]),
                "step speed-up": f"{base[0] / step_s:.2f}x",
                "attention ms": median(attention[name]),
                "attention speed-up": f"{base[1] / attention_s:.2f}x",
                "planning ms": median(planning[name]),
                "planning share of the step": f"{statistics.median(planning[name]) / step_s:.1%}",
            }
        )
    return rows, {"layers": transformer.config.num_layers, "heads": transformer.config.num_attention_heads}


def measure_backends(layout: VideoLayout, density: float, rounds: int) -> list[dict]:
    """One attention call per kind of plan and backend: what `auto` chooses from."""
    import torch

    from vidaccel import SVG, SVG2, Radial, Tangent, sparse_attention
    from vidaccel.attention import BACKENDS, BlockPlan, PlanMemory

    q, k, v = torch.randn(3, 1, 3, layout.tokens, 64, generator=torch.Generator().manual_seed(1))
    plans = {
        "dense": BlockPlan.dense(layout.tokens, layout.tokens),
        "uniform blocks of 64 (radial)": Radial.for_density(layout, density, block_size=64).plan(
            q, k, v, layout, PlanMemory()
        ),
        "bands (svg)": SVG(density=density).plan(q, k, v, layout, PlanMemory()),
        "scattered runs (svg2)": SVG2(density=density).plan(q, k, v, layout, PlanMemory()),
        "scattered runs with stand-ins (tangent)": Tangent(density=density).plan(q, k, v, layout, PlanMemory()),
    }
    rows = []
    for kind, plan in plans.items():
        oracle = sparse_attention(q.double(), k.double(), v.double(), plan, backend="reference")
        for name in BACKENDS:
            if (name == "sdpa") != plan.is_dense:
                continue
            start = time.perf_counter()
            try:
                out = sparse_attention(q, k, v, plan, backend=name)
            except RuntimeError as error:
                print(error)  # it cannot run such a plan here
                continue
            first = time.perf_counter() - start
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                sparse_attention(q, k, v, plan, backend=name)
                seconds.append(time.perf_counter() - start)
            rows.append(
                {
                    "plan": kind,
                    "density": round(plan.density(), 3),
                    "backend": name,
                    "first call s": f"{first:.1f}",
                    "ms": median(seconds),
                    "max error against float64": f"{(out - oracle).abs().max():.1e}",
                }
            )
    return rows


def main(
    density: float = 0.2,
    rounds: int = 7,
    threads: int = 0,
    backend: str = "auto",
    videos: str = VIDEOS,
    out: Path = RESULTS,
) -> None:
    """Measure at a density, on `--videos` (frames, 4k+1, x pixels of a side); `--threads 0` leaves them to torch."""
    import torch

    from vidaccel.generation.showcase.step_times import MEASURED_STEPS

    out.mkdir(parents=True, exist_ok=True)  # before what takes minutes

    if threads:
        torch.set_num_threads(threads)
    layouts = layouts_of(videos)
    steps: list[dict] = []
    for layout in layouts:
        rows, model = measure_steps(layout, density, rounds, backend)
        steps += rows
    backends = measure_backends(layouts[-1], density, rounds)
    write_csv(out / "cpu_speed.csv", steps)
    write_markdown(
        out / "cpu_speed.md",
        f"Speed on the CPU, {layouts[0].tokens:,} to {layouts[-1].tokens:,} tokens",
        f"`python benchmarks/cpu_speed.py --density {density} --rounds {rounds} --videos {videos}`; "
        f"{environment_line()}.\n\n"
        f"One step is one forward pass of the demo transformer ({model['layers']} layers, {model['heads']} heads of "
        f"64, float32) on the latents of {videos} (frames x pixels of a side). Dense is torch's SDPA in the same "
        f"process. Mean of {MEASURED_STEPS} steps after a warm-up step (first plan, 50 k-means iterations, "
        f"compilation), which is not counted; median of {rounds} such, with the smallest and largest in brackets. "
        "`tangent` clusters anew in one of the three. Attention includes permutations and making masks, planning is "
        "apart. The second table "
        f"is one attention call on random q, k, v at {layouts[-1].tokens:,} tokens per kind of plan.\n\n"
        "OMP_WAIT_POLICY: " + os.environ.get("OMP_WAIT_POLICY", "not set (threads spin between calls)") + ".",
        steps,
        backends,
    )


if __name__ == "__main__":
    typer.run(main)
