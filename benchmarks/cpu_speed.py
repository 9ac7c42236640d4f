"""What a method saves on the CPU: one denoising step of the demo transformer on a long video, and its attention alone.

    python benchmarks/cpu_speed.py

129 frames of 256x256 pixels are 33 x 16 x 16 = 8,448 tokens. Dense and every method are measured in one process, taking
turns, so that a slow minute of the machine hits all of them. Results go to `benchmarks/results/cpu_speed.*`.
"""

from __future__ import annotations

import csv
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from common import RESULTS, environment_line, write_markdown

if TYPE_CHECKING:
    from vidaccel import VideoLayout

METHODS = ("radial", "svg", "svg2")


def median(values: list[float]) -> str:
    """Median with the smallest and largest value, in milliseconds."""
    low, middle, high = (1000 * f(values) for f in (min, statistics.median, max))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def measure_steps(layout: VideoLayout, density: float, rounds: int, backend: str) -> tuple[list[dict], dict]:
    """Steps of the whole transformer: dense, then each method, `rounds` times in turns."""
    import torch
    from diffusers import WanTransformer3DModel

    from vidaccel import DenseSchedule, accelerate, demo
    from vidaccel.attention import METHODS as CLASSES

    transformer = WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer").eval()
    generator = torch.Generator().manual_seed(0)
    size = (layout.frames, 2 * layout.height, 2 * layout.width)
    latents = torch.randn(1, transformer.config.in_channels, *size, generator=generator)
    text = torch.randn(1, 512, transformer.config.text_dim, generator=generator)
    settings = {"radial": {"block_size": 64}}
    configs = {
        name: CLASSES[name].for_density(layout, density, schedule=DenseSchedule(), **settings.get(name, {}))
        for name in METHODS
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("dense", *METHODS)}
    attention: dict[str, list[float]] = {name: [] for name in seconds}
    planning: dict[str, list[float]] = {name: [] for name in seconds}
    facts: dict[str, tuple[float, str]] = {}

    def step(number: int) -> float:
        start = time.perf_counter()
        transformer(latents, torch.tensor([900.0 - number]), text)
        return time.perf_counter() - start

    # One handle per configuration for the whole measurement would keep the others out, so state that a method carries
    # from step to step (centroids, compiled kernels, static masks) is warmed up anew each round and not counted.
    with torch.inference_mode():
        for _ in range(rounds):
            for name in seconds:
                dense = name == "dense"
                schedule = DenseSchedule(first_steps=10**6) if dense else None
                with accelerate(
                    transformer, configs["radial" if dense else name], backend=backend, schedule=schedule
                ) as h:
                    step(0)
                    warm = len(h.report().records)
                    seconds[name].append(step(1))
                    records = h.report().records[warm:]
                attention[name].append(sum(r.attention_seconds for r in records))
                planning[name].append(sum(r.plan_seconds for r in records))
                facts[name] = (statistics.mean(r.density for r in records), records[0].backend)
            print(name, "round done", flush=True)

    rows, base = [], (statistics.median(seconds["dense"]), statistics.median(attention["dense"]))
    for name in seconds:
        step_s, attention_s = statistics.median(seconds[name]), statistics.median(attention[name])
        rows.append(
            {
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

    from vidaccel import SVG, SVG2, Radial, sparse_attention
    from vidaccel.attention import BACKENDS, BlockPlan, PlanMemory

    q, k, v = torch.randn(3, 1, 3, layout.tokens, 64, generator=torch.Generator().manual_seed(1))
    plans = {
        "dense": BlockPlan.dense(layout.tokens, layout.tokens),
        "uniform blocks of 64 (radial)": Radial.for_density(layout, density, block_size=64).plan(
            q, k, v, layout, PlanMemory()
        ),
        "bands (svg)": SVG(density=density).plan(q, k, v, layout, PlanMemory()),
        "scattered runs (svg2)": SVG2(density=density).plan(q, k, v, layout, PlanMemory()),
    }
    rows = []
    for kind, plan in plans.items():
        oracle = sparse_attention(q.double(), k.double(), v.double(), plan, backend="reference")
        for name in BACKENDS:
            if (name == "sdpa") != plan.is_dense or BACKENDS[name].unavailable(q.device):
                continue
            start = time.perf_counter()
            out = sparse_attention(q, k, v, plan, backend=name)
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
    frames: int = 129,
    size: int = 256,
    out: Path = RESULTS,
) -> None:
    """Measure at a density, on `--frames` (4k+1) of `--size` pixels squared; `--threads 0` leaves them to torch."""
    import torch

    from vidaccel import VideoLayout

    if threads:
        torch.set_num_threads(threads)
    layout = VideoLayout((frames - 1) // 4 + 1, size // 16, size // 16)
    steps, model = measure_steps(layout, density, rounds, backend)
    backends = measure_backends(layout, density, rounds)
    with (out / "cpu_speed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, steps[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(steps)
    write_markdown(
        out / "cpu_speed.md",
        f"Speed on the CPU, {layout.tokens:,} tokens",
        f"`python benchmarks/cpu_speed.py --density {density} --rounds {rounds}`; {environment_line()}.\n\n"
        f"One step is one forward pass of the demo transformer ({model['layers']} layers, {model['heads']} heads of "
        f"64, float32) on the latents of {frames} frames of {size}x{size}. Dense is torch's SDPA in the same process. "
        f"Median of {rounds} with the smallest and largest in brackets; the warm-up step before each (first plan, 50 "
        "k-means iterations, compilation) is not counted. Attention includes permutations, planning is apart. The "
        "second table is one attention call on random q, k, v per kind of plan.\n\n"
        "OMP_WAIT_POLICY: "
        + os.environ.get("OMP_WAIT_POLICY", "not set (threads spin between calls)")
        + ". PASSIVE, which "
        "helps small models, makes each of the many calls of `gather` wait for its threads.",
        steps,
        backends,
    )


if __name__ == "__main__":
    typer.run(main)
