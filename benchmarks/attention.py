"""Attention alone: every installed implementation on the plans of every method, at the shapes of real models.

    python benchmarks/attention.py                      # all shapes
    python benchmarks/attention.py --shapes wan-1.3b-480p --budget-seconds 500
    python benchmarks/attention.py --shapes tiny        # on a CPU

Needs torch, and triton on a GPU; matplotlib only for the picture. Each row is written as soon as it is measured, and a
run that was broken off goes on where it stopped (`--fresh` starts anew), so that several short runs make one table.

Columns: milliseconds (median, 20th and 80th percentile), TFLOP/s of the pairs that the plan names, ratio to the fastest
dense kernel, ratio to the fastest other implementation on the same plan, planning, peak memory above the inputs, error
of some rows against float32 under the same plan, and the seconds of the first call with an empty compilation cache.
"""

from __future__ import annotations

import argparse  # not typer: machines with a GPU to measure on often have torch and nothing else
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, append_row, markdown_table, read_rows, version_of, write_csv, write_whole

SAMPLE = 32  # rows whose error is measured
FLUSHED = 256 * 2**20  # bytes written between two calls, more than any L2 cache


@dataclass(frozen=True)
class Shape:
    """A model's self-attention call: a grid of latent frames and patches, with text behind it."""

    frames: int
    height: int
    width: int
    heads: int
    head_dim: int
    text: int = 0


SHAPES = {
    "toy": Shape(4, 5, 5, 1, 16, text=4),
    "tiny": Shape(5, 8, 8, 2, 64, text=8),
    "wan-1.3b-480p": Shape(21, 30, 52, 12, 128),
    "wan-14b-720p": Shape(21, 45, 80, 40, 128),
    "hunyuan-720p": Shape(33, 45, 80, 24, 128, text=256),
    "cogvideox": Shape(13, 30, 45, 48, 64, text=226),
}
METHODS = ("dense", "radial", "svg", "svg2", "tangent", "skewed clusters")
COLUMNS = (
    *("gpu", "shape", "plan", "density", "implementation", "pass", "ms", "p20", "p80", "tflops", "vs_dense"),
    *("vs_best_other", "planning_ms", "peak_mib", "max_error", "mean_error", "first_call_s", "note"),
)


def find_package() -> None:
    """Make `import vidaccel` work in a checkout that is not installed: the folder above is the package."""
    if importlib.util.find_spec("vidaccel") is None:
        root = Path(__file__).parents[1]
        spec = importlib.util.spec_from_file_location(
            "vidaccel", root / "__init__.py", submodule_search_locations=[str(root)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["vidaccel"] = module
        spec.loader.exec_module(module)


def make_plan(method: str, density: float, layout, q, k, v):
    """The plan of a method on random tokens, and the milliseconds of making it once more with warm centroids."""
    import torch

    from vidaccel import BlockPlan
    from vidaccel.attention import METHODS as CLASSES
    from vidaccel.attention import PlanMemory

    if method == "dense":
        return BlockPlan.dense(layout.tokens, layout.tokens, q.device), 0.0
    if method == "skewed clusters":
        return skewed_plan(density, layout.tokens, q), 0.0
    config = CLASSES[method].for_density(layout, density)
    memory = PlanMemory()
    with torch.inference_mode():
        config.plan(q, k, v, layout, memory)
        synchronize(q)
        start = time.perf_counter()
        plan = config.plan(q, k, v, layout, memory)
        synchronize(q)
    return plan, 1000 * (time.perf_counter() - start)


def skewed_plan(density: float, tokens: int, q):
    """Clusters as uneven as real ones can be: log-normal sizes (sigma 1), key clusters read at random, any order."""
    import torch

    from vidaccel import BlockPlan

    generator = torch.Generator().manual_seed(0)
    heads, sizes = q.shape[1], {}
    for name, count in (("q", max(2, round(0.364 * tokens**0.5))), ("k", max(4, round(1.8 * tokens**0.5)))):
        weight = torch.randn(1, heads, count, generator=generator).exp()
        edges = (weight.cumsum(-1) / weight.sum(-1, keepdim=True) * tokens).round().long()
        edges[..., -1] = tokens
        sizes[name] = edges.diff(dim=-1, prepend=torch.zeros_like(edges[..., :1]))
    score = torch.rand(1, heads, sizes["q"].shape[-1], sizes["k"].shape[-1], generator=generator)
    rank = score.argsort(-1)
    kept = sizes["k"].unsqueeze(2).expand(score.shape).gather(-1, rank).cumsum(-1) <= density * tokens
    kept[..., 0] = True
    selected = torch.zeros_like(kept).scatter_(-1, rank, kept)
    orders = [torch.rand(1, heads, tokens, generator=generator).argsort(-1) for _ in range(2)]
    return BlockPlan.from_clusters(sizes["q"], sizes["k"], selected, *orders).to(q.device)


def synchronize(tensor) -> None:
    import torch

    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def time_calls(call: Callable[[], Any], device, repeats: int, seconds: float) -> list[float]:
    """Milliseconds of up to `repeats` calls within about `seconds`, at least three, with a cold L2 cache on a GPU."""
    import torch

    flush = torch.empty(FLUSHED, dtype=torch.int8, device=device) if device.type == "cuda" else None
    times, begin = [], time.perf_counter()
    while len(times) < 3 or (len(times) < repeats and time.perf_counter() - begin < seconds):
        if flush is None:
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
            continue
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return times


def expected_rows(tensors, plan, rows):
    """Attention of some query rows in float32 under the plan's mask and to its stand-ins, `[B, H, R, D]`, head by head.

    For one batch entry.
    """
    import torch

    q, k, v = tensors
    mask = plan.rows(rows).expand(*q.shape[:2], -1, -1)
    if plan.skipped is not None:
        tile = plan.tile_of_token()[..., rows].expand(*q.shape[:2], -1)
        bias = plan.stand_in_bias().expand(*q.shape[:2], -1, -1)
    heads = []
    for h in range(q.shape[1]):
        some, scale = q[:, h, rows].float(), q.shape[-1] ** -0.5
        scores = some @ k[:, h].float().transpose(-1, -2) * scale
        scores = scores.masked_fill(~mask[:, h], -torch.inf)
        out = 0.0
        if plan.skipped is not None:
            own = tile[0, h]
            key, value = (
                (x[0, h, own] if plan.skipped.of_each_tile else x[0, h]).float().expand(len(rows), -1, -1)
                for x in (plan.skipped.key, plan.skipped.value)
            )
            extra = (key @ some[0].unsqueeze(-1)).squeeze(-1) * scale + bias[0, h, own]
            total = torch.cat([scores[0], extra], -1).logsumexp(-1, keepdim=True)
            out = ((extra - total).exp().unsqueeze(-2) @ value).squeeze(-2)
            weights = (scores - total).exp()
            out = out + moved(some[0], plan.skipped, h, own)
        else:
            weights = scores.softmax(-1)
        heads.append(weights @ v[:, h].float() + out)
    return torch.stack(heads, 1)


def moved(queries, skipped, head, tile):
    """What moves with queries `[R, D]` of one head, of those tiles `[R]`: `SkippedClusters.slope`, in float32."""
    import torch

    slope, centre = skipped.slope, skipped.centre
    if slope is None:
        return 0.0
    inside = tile < slope.shape[2]
    tile = tile.clamp(max=slope.shape[2] - 1)
    beyond = queries if centre is None else queries - centre[0, head, tile].float()
    added = (beyond.unsqueeze(-2) @ slope[0, head, tile].float()).squeeze(-2)
    return torch.where(inside.unsqueeze(-1), added, 0.0)


def measure(contender, tensors, plan, backward: bool, repeats: int) -> dict[str, Any]:
    """One row of the table: times, memory and error, or in `note` why there are none."""
    import torch

    q = tensors[0]
    device = q.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    inputs = tuple(x.detach().requires_grad_(backward) for x in tensors)
    with torch.set_grad_enabled(backward):
        call = contender.bind(inputs, plan)
        start = time.perf_counter()
        out = call()
        if backward:
            gradient = torch.randn_like(out)
            torch.autograd.grad(out, inputs, gradient, retain_graph=True)
        synchronize(q)
        first = time.perf_counter() - start
        rows = torch.linspace(0, q.shape[2] - 1, SAMPLE, device=device).long().unique()
        error = (out[:, :, rows].float() - expected_rows(tensors, plan, rows)).abs()
        timed = (lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)) if backward else call
        timed()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = time_calls(timed, device, repeats, 10.0)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else None
    median = statistics.median(times)
    quantiles = statistics.quantiles(times, n=5) if len(times) > 1 else [median] * 4
    # Two products forward, five backward (scores again, dP, dQ, dK, dV), two operations a multiply-add.
    pairs = plan.density() * q.shape[0] * q.shape[1] * plan.n_q * plan.n_kv
    operations = (5 if backward else 2) * 2 * pairs * q.shape[-1]
    return {
        "ms": round(median, 3),
        "p20": round(quantiles[0], 3),
        "p80": round(quantiles[3], 3),
        "tflops": round(operations / median / 1e9, 2),
        "peak_mib": None if peak is None else round(peak),
        "max_error": f"{error.max().item():.1e}",
        "mean_error": f"{error.mean().item():.1e}",
        "first_call_s": round(first, 2),
    }


def work(arguments: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """(shape, method, density) in the order of measurement: dense first, because ratios need it."""
    for shape in arguments.shapes:
        for method in arguments.methods:
            for density in (1.0,) if method == "dense" else (d for d in arguments.densities if d < 1):
                yield shape, method, density


def run(arguments: argparse.Namespace, raw: Path) -> None:
    """Measure what is missing and append it to `raw`."""
    import torch
    from contenders import contenders

    from vidaccel import VideoLayout

    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # on whose stream events are recorded
    dtype = getattr(torch, arguments.dtype)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    direction = "backward" if arguments.backward else "forward"
    rows = read_rows(raw, to_append=True)
    made_with = f"{arguments.dtype}, torch {torch.__version__}"
    if others := {r.get("made_with", "unknown versions") for r in rows} - {made_with}:
        sys.exit(f"{raw} has rows of {', '.join(others)}, not of {made_with}: give another --out, or --fresh.")
    done = {tuple(r[c] for c in ("gpu", "shape", "plan", "wanted", "implementation", "pass")) for r in rows}
    begin = time.perf_counter()
    for name, method, density in work(arguments):
        todo = [
            c
            for c in contenders(device)
            if (c.sparse or method == "dense")
            and (c.backward or not arguments.backward)
            and (gpu, name, method, density, c.name, direction) not in done
        ]
        if not todo:
            continue
        shape = SHAPES[name]
        layout = VideoLayout(shape.frames, shape.height, shape.width, text_after=shape.text)
        generator = torch.Generator(device).manual_seed(0)
        size = (1, shape.heads, layout.tokens, shape.head_dim)
        tensors = tuple(torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(3))
        row = {"gpu": gpu, "made_with": made_with, "shape": name, "plan": method, "wanted": density, "pass": direction}
        try:
            plan, planning = make_plan(method, density, layout, *tensors)
        except (ValueError, torch.OutOfMemoryError) as error:  # a density that the layout does not allow
            todo, row["note"] = todo[:1], f"no plan: {note_of(error)}"
            plan = None
        for contender in todo:
            if time.perf_counter() - begin > arguments.budget_seconds:
                print("the time is up; run again to go on")
                return
            result = {**row, "implementation": contender.name if plan is not None else "-"}
            if plan is not None:
                result |= {
                    "density": round(plan.density(), 4),
                    "planning_ms": round(planning, 2),
                    "ours": contender.ours,
                }
                try:
                    result |= measure(contender, tensors, plan, arguments.backward, arguments.repeats)
                except Exception as error:  # a baseline that cannot run is a result, and says why
                    result["note"] = note_of(error)
            append_row(raw, result)
            print(
                *(f"{result.get(c, '')}" for c in ("shape", "plan", "density", "implementation", "ms", "note")),
                flush=True,
            )
            gc.collect()
        del tensors


def note_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def summarise(rows: list[dict]) -> list[dict]:
    """The table: ratios to the fastest dense kernel, and to the fastest implementation of others on the same plan."""
    fastest: dict[tuple, float] = {}
    for row in rows:
        if "ms" not in row:
            continue
        place = (row["gpu"], row["shape"], row["pass"])
        keys = [(*place, "dense")] if row["plan"] == "dense" and not row["ours"] else []
        if not row["ours"]:
            keys.append((*place, row["plan"], row["wanted"]))
        for key in keys:
            fastest[key] = min(row["ms"], fastest.get(key, float("inf")))
    table = []
    for row in rows:
        place = (row["gpu"], row["shape"], row["pass"])
        ratios = {"vs_dense": (*place, "dense"), "vs_best_other": (*place, row["plan"], row["wanted"])}
        extra = {n: f"{fastest[key] / row['ms']:.2f}" for n, key in ratios.items() if "ms" in row and key in fastest}
        table.append({c: {**row, **extra}.get(c, "") for c in COLUMNS})
    return table


def figure(table: list[dict], path: Path) -> bool:
    """TFLOP/s over density, one panel a shape; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [r for r in table if r["ms"] != "" and r["pass"] == "forward"]
    shapes = list(dict.fromkeys(r["shape"] for r in measured))
    if not shapes:
        return True
    fig, axes = plt.subplots(1, len(shapes), figsize=(4.5 * len(shapes), 3.6), layout="constrained", squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        names = dict.fromkeys((r["plan"], r["implementation"]) for r in measured if r["shape"] == shape)
        for plan, name in names:
            line = sorted(
                (float(r["density"]), float(r["tflops"]))
                for r in measured
                if (r["shape"], r["plan"], r["implementation"]) == (shape, plan, name)
            )
            axis.plot(*zip(*line, strict=True), marker="o", label=f"{name}, {plan}")
        axis.set(title=shape, xlabel="density", ylabel="TFLOP/s of the plan's pairs", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return True


def publish(rows: list[dict], out: Path, versions: str) -> None:
    """Write the CSV, the page and the picture from the rows, each beside its place and then into it."""
    table = summarise(rows)
    write_csv(out / "attention.csv", table)
    drawn = figure(table, out / ".attention.png")
    if drawn and (out / ".attention.png").exists():
        os.replace(out / ".attention.png", out / "attention.png")
    lines = [
        "# Attention alone",
        f"`python benchmarks/attention.py`; {versions}.",
        (__doc__ or "").strip().split("\n\n")[-1],
    ]
    lines.append(
        "![TFLOP/s over density](attention.png)" if drawn else "No picture: matplotlib is not installed there."
    )
    write_whole(out / "attention.md", "\n\n".join([*lines, markdown_table(table)]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[s for s in SHAPES if s not in ("toy", "tiny")])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--densities", nargs="+", type=float, default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="")
    parser.add_argument("--backward", action="store_true", help="time the backward pass instead of the forward one")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--fresh", action="store_true", help="delete the rows of earlier runs first")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        # Empty caches, so that the first call of each kernel shows what compiling it costs.
        os.environ["TRITON_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        import torch

        arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if arguments.device.startswith("cuda") and not torch.cuda.is_available():
            parser.error(f"--device {arguments.device}: torch finds no CUDA device here; leave it out, or use cpu.")
        find_package()
        arguments.out.mkdir(parents=True, exist_ok=True)
        raw = arguments.out / "attention.jsonl"
        if arguments.fresh:
            raw.unlink(missing_ok=True)
        run(arguments, raw)
        rows = read_rows(raw)
        if not rows:
            return
        versions = f"torch {torch.__version__}, triton {version_of('triton') or 'not installed'}"
        publish(rows, arguments.out, f"{versions}, {arguments.dtype}")


if __name__ == "__main__":
    main()
