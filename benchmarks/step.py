"""One denoising step of a whole transformer with random weights, dense and with each method: where its time goes.

    python benchmarks/step.py --model wan-1.3b                        # 480p, 81 frames, on a GPU
    python benchmarks/step.py --model wan-14b --layers 8
    python benchmarks/step.py --model hunyuan-video --layers 9
    python benchmarks/step.py --model tiny --frames 9 --height 64 --width 64 --device cpu

Random weights have the speed of trained ones. k-means takes as long as on real tokens, and plans have the density that
was asked for; which head is spatial or temporal is meaningless. Needs diffusers. `--layers` measures fewer layers than
the model has, where memory or time is short; the time outside attention shrinks with them. Results go to
`benchmarks/results/step-*`, one table per model and size, after each method. A call that was broken off is gone on with
by the next of the same machine, versions and options, unless that has `--fresh`.
"""

from __future__ import annotations

import statistics
import time
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from common import RESULTS, Parts, environment_line, write_csv, write_markdown
from step_models import MODELS

METHODS = ("radial", "svg", "svg2", "tangent")


def measure(transformer, inputs: dict, config, schedule, backend: str, steps: int, device) -> dict[str, float | str]:
    """Median seconds of a step after a warm-up, and of planning and attention in it."""
    import torch

    from vidaccel import accelerate

    seconds, planning, attention = [], [], []
    with torch.inference_mode(), accelerate(transformer, config, backend=backend, schedule=schedule) as handle:
        for number in range(steps + 1):
            before = len(handle.report().records)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            transformer(timestep=torch.tensor([900.0 - number], device=device), **inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent = time.perf_counter() - start
            records = handle.report().records[before:]
            if number == 0:
                first = spent  # compiles, and begins k-means
                continue
            seconds.append(spent)
            planning.append(sum(r.plan_seconds for r in records))
            attention.append(sum(r.attention_seconds for r in records))
        notes = handle.report().notes
    low, middle, high = (1000 * f(seconds) for f in (min, statistics.median, max))
    return {
        "density": round(statistics.mean(r.density for r in records), 3),
        "backend": records[0].backend,
        "seconds": middle / 1000,
        "step ms": f"{middle:.1f} ({low:.1f} to {high:.1f})",
        "planning ms": round(1000 * statistics.median(planning), 1),
        "attention ms": round(1000 * statistics.median(attention), 1),
        "first step s": round(first, 1),
        "peak MiB": round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else "",
        "notes": "; ".join(notes),
    }


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "wan-1.3b",
    frames: Annotated[int, typer.Option(help="Pixel frames; 0 is what the model is published with.")] = 0,
    height: Annotated[int, typer.Option(help="Pixels; 0 is what the model is published with.")] = 0,
    width: Annotated[int, typer.Option(help="Pixels; 0 is what the model is published with.")] = 0,
    density: Annotated[float, typer.Option(help="Of the sparse calls.")] = 0.25,
    layers: Annotated[int, typer.Option(help="Fewer layers than the model has; 0 is all.")] = 0,
    steps: Annotated[int, typer.Option(help="Measured steps, after one that is not counted.")] = 5,
    backend: str = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on with a call that was broken off.")] = False,
    out: Path = RESULTS,
) -> None:
    """Measure dense and every method on random weights."""
    if model not in MODELS:
        raise typer.BadParameter(f"--model is {model!r}: choose {', '.join(MODELS)}.")
    known = MODELS[model]
    frames, height, width = (given or own for given, own in zip((frames, height, width), known.video, strict=True))
    step, multiple = known.factors[0], 2 * known.factors[1]
    if frames % step != 1 or height % multiple or width % multiple:
        raise typer.BadParameter(
            f"{frames} frames of {height}x{width}: frames must be {step}k+1, sizes multiples of {multiple}."
        )
    import diffusers
    import torch

    from vidaccel import DenseSchedule
    from vidaccel.attention import METHODS as CLASSES
    from vidaccel.pipelines import find_transformers

    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kind = getattr(torch, ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        transformer = getattr(diffusers, known.transformer)(**known.with_layers(layers)).eval()
        torch.set_default_dtype(default)
    config = transformer.config

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=kind)

    given = known.inputs(config, noise, *known.latent(frames, height, width))
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    ((_, family),) = find_transformers(transformer).values()
    (layout,) = family.layout(transformer, inputs)
    inputs["return_dict"] = False
    stem = f"step-{model}-{width}x{height}x{frames}"
    made_with = (
        f"`python benchmarks/step.py --model {model} --frames {frames} --height {height} --width {width} --density "
        f"{density} --layers {layers} --steps {steps}`; random weights, {len(family.modules(transformer))} layers of "
        f"{config.num_attention_heads} heads of {config.attention_head_dim}, {kind}; {environment_line(device.type)}"
    )
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts(out / f"{stem}.json", ("dense", *METHODS), f"{made_with}; --backend {backend}", fresh)

    @cache
    def method(name: str):  # found once: for some that takes seconds at the size of a large model
        return CLASSES[name].for_density(layout, density, schedule=DenseSchedule())

    for name in parts.left:
        chosen = method(METHODS[0] if name == "dense" else name)
        schedule = DenseSchedule(first_steps=10**6) if name == "dense" else None
        parts.add(name, measure(transformer, inputs, chosen, schedule, backend, steps, device))
        print(name, parts.done[name]["step ms"], "ms", flush=True)
        base = parts.done["dense"]["seconds"]
        table = [
            {"method": known, "step speed-up": f"{base / row['seconds']:.2f}x", **row}
            for known, row in parts.done.items()
        ]
        table = [{column: value for column, value in row.items() if column != "seconds"} for row in table]
        write_csv(out / f"{stem}.csv", table)
        write_markdown(
            out / f"{stem}.md",
            f"One step of {model}, {frames} frames of {width}x{height}: {layout.tokens} tokens",
            f"{made_with}. Median of {steps} with the smallest and largest in brackets. The first step, which compiles "
            "kernels and begins k-means, is apart."
            + (f" Not measured yet: {', '.join(parts.left)}." if parts.left else ""),
            table,
        )


if __name__ == "__main__":
    typer.run(main)
