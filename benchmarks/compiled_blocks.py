"""What compiled blocks save on the CPU: a step of the demo transformer, dense and with sparse attention.

    python benchmarks/compiled_blocks.py

The blocks as they are and compiled (`Preset(compile=True)`) take turns in one process. Results go to
`benchmarks/results/compiled_blocks.*`.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from common import RESULTS, environment_line, write_csv, write_markdown
from cpu_speed import layouts_of, median

if TYPE_CHECKING:
    import torch

    from vidaccel import VideoLayout

VIDEOS = "33x128,129x128,129x256"  # frames x pixels of a side
ROWS = ("dense", "dense, layers in int8", "tangent")


def measure(layout: VideoLayout, name: str, density: float, rounds: int, steps: int) -> dict[str, Any]:
    """Steps of the whole transformer with one of `ROWS`, the blocks as they are and compiled in turns."""
    import torch
    from diffusers import WanTransformer3DModel

    from vidaccel import DenseSchedule, accelerate, demo
    from vidaccel.generation.showcase.step_times import quick_method, wan_inputs
    from vidaccel.pipelines.acceleration.families import find_transformers
    from vidaccel.pipelines.presets import Compile, Quantize
    from vidaccel.pipelines.presets.compiling import compile_blocks
    from vidaccel.pipelines.presets.quantise import quantise

    transformer = WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer").eval()
    ((bare, family),) = find_transformers(transformer).values()
    inputs = wan_inputs(transformer, layout)
    if "int8" in name:
        quantise(bare, family, Quantize("int8", activations=True))

    def step(number: int) -> torch.Tensor:
        return transformer(*inputs(number), return_dict=False)[0]

    def timed(first: int) -> float:
        start = time.perf_counter()
        for number in range(first, first + steps):
            step(number)
        return (time.perf_counter() - start) / steps

    def method() -> Any:
        schedule = DenseSchedule(first_steps=10**6) if "dense" in name else None
        return accelerate(transformer, quick_method("tangent", layout, density), schedule=schedule)

    def compiled() -> Any:
        return compile_blocks(bare, family, Compile(), below_hooks=False)

    def begun(change: Callable[[], Any] | None) -> tuple[torch.Tensor, float]:
        """The first step of a run, and its seconds."""
        with method():
            made = None if change is None else change()
            start = time.perf_counter()
            out = step(0)
            seconds = time.perf_counter() - start
            if made is not None:
                made.remove()
        return out, seconds

    with torch.inference_mode():
        (plain, _), (other, compilation) = begun(None), begun(compiled)
        eager, quick = [], []
        with method():
            step(0)
            for number in range(rounds):
                first = 1 + 2 * steps * number
                eager.append(timed(first))
                made = compiled()
                step(first + steps - 1)  # finds the code that was compiled
                quick.append(timed(first + steps))
                made.remove()
    print(layout.tokens, name, "measured", flush=True)
    return {
        "tokens": layout.tokens,
        "attention": name if "dense" in name else f"{name}, density {density:g}",
        "step ms": median(eager),
        "compiled, step ms": median(quick),
        "of the time": f"{statistics.median(b / a for a, b in zip(eager, quick, strict=True)):.2f}",
        "off by": f"{(other - plain).norm() / plain.norm():.0e}",
        "first step with compilation s": f"{compilation:.1f}",
    }


def main(
    density: float = 0.2, rounds: int = 7, steps: int = 3, threads: int = 0, videos: str = VIDEOS, out: Path = RESULTS
) -> None:
    """Measure on `--videos` (frames, 4k+1, x pixels of a side); `--threads 0` leaves them to torch."""
    import torch

    out.mkdir(parents=True, exist_ok=True)  # before what takes minutes

    if threads:
        torch.set_num_threads(threads)
    layouts = layouts_of(videos)
    names = [name for name in ROWS if "int8" not in name or importlib.util.find_spec("torchao")]
    rows = [measure(layout, name, density, rounds, steps) for layout in layouts for name in names]
    write_csv(out / "compiled_blocks.csv", rows)
    write_markdown(
        out / "compiled_blocks.md",
        "Compiled blocks on the CPU",
        f"`python benchmarks/compiled_blocks.py --density {density} --rounds {rounds} --videos {videos}`; "
        f"{environment_line()}.\n\n"
        f"One step is one forward pass of the demo transformer on the latents of {videos} (frames x pixels of a side), "
        f"the mean of {steps}; median of {rounds} such, with the smallest and largest in brackets, eager and compiled "
        "in turns. *Of the time*: compiled over eager, the median over the rounds. *Off by*: how far the output of the "
        "first step is from the eager one, relative to its size. Code that an earlier process compiled comes from "
        "torch's cache, and the first step is then shorter. *int8*: torchao's, of weights and activations, where it is "
        "installed.",
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
