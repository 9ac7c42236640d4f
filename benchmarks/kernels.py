"""The parts of a sparse call on a GPU: launch configurations of the forward kernel, the passes around it, and planning.

    python benchmarks/kernels.py                          # Wan 2.1 14B at 720p: 75,600 tokens, 40 heads of 128
    python benchmarks/kernels.py --parts planning
    python benchmarks/kernels.py --shape cogvideox

Needs torch and triton alone. This is what the launch tables in `attention/kernels/` are chosen by; `attention.py` holds
the whole against other implementations. Random tokens: k-means makes clusters of even sizes of them. Prints as it goes,
and writes `benchmarks/results/kernels-GPU-SHAPE.md`, and the rows as `.json`, after each part. A call that was broken
off is gone on with by the next of the same machine, versions and options, unless that has `--fresh`, as after a change
of a kernel. Without a GPU, to see whether it runs: set `TRITON_INTERPRET=1`, and `--shape toy --density 0.8 --device
cpu --dtype float32 --chosen`.
"""

from __future__ import annotations

import argparse  # not typer: machines with a GPU to measure on often have torch and nothing else
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, Parts, markdown_table, write_whole

from attention import SHAPES, Shape, find_package, time_calls

PARTS = ("forward", "variants", "passes", "planning")
DENSITIES = {"radial": 0.25, "svg": 0.3, "svg2": 0.1, "tangent": 0.1}
VARIANTS = {"as the inputs": {}, "int8": {"qk": "int8"}, "second stage": {"pv_threshold": 8.0}}
TOP = 8  # kernels that are named of a planning step


def configurations() -> list[Any]:
    """Launch configurations of the forward kernel that are worth a try on 16-bit inputs."""
    from vidaccel.attention.kernels.launch import Tiles

    plain = [Tiles(128, 64, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3)]
    sizes = [(128, 64, 8, 3, 32), (128, 128, 8, 3, 64), (128, 128, 8, 2, 64), (64, 64, 4, 3, 32), (64, 128, 4, 3, 32)]
    return plain + [Tiles(*size, described=True) for size in sizes]


class Bench:
    """Random q, k and v of a shape, and the clock."""

    def __init__(self, shape: Shape, arguments: argparse.Namespace) -> None:
        import torch

        from vidaccel import VideoLayout

        self.layout = VideoLayout(shape.frames, shape.height, shape.width, text_after=shape.text)
        self.repeats, self.density = arguments.repeats, arguments.density
        self._methods: dict[str, Any] = {}
        self.tried = [] if arguments.chosen else configurations()
        device, dtype = arguments.device, getattr(torch, arguments.dtype)
        generator = torch.Generator(device).manual_seed(0)
        size = (1, self.layout.tokens, shape.heads, shape.head_dim)  # in memory as projections leave it
        self.tensors = [
            torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)
        ]

    def method(self, name: str) -> Any:
        """A method at the density that is measured, which takes seconds to find for some: when wanted, and once."""
        from vidaccel.attention import METHODS

        if name not in self._methods:
            self._methods[name] = METHODS[name].for_density(self.layout, self.density or DENSITIES[name])
        return self._methods[name]

    def milliseconds(self, call: Callable[[], Any]) -> float:
        call()
        return statistics.median(time_calls(call, self.tensors[0].device, self.repeats, 5.0))

    def forward(self) -> Iterator[dict]:
        """Each configuration on a plan of long aligned runs, and on one of clusters."""
        from vidaccel.attention import PlanMemory
        from vidaccel.attention.kernels.block_sparse_forward import forward_tiles, launch_forward, results
        from vidaccel.attention.kernels.launch import LOG2E
        from vidaccel.attention.kernels.permute import keys_in_order
        from vidaccel.attention.kernels.stand_ins import stand_ins_of

        q, k, v = self.tensors
        for name in ("radial", "svg2", "tangent"):
            plan = self.method(name).plan(q, k, v, self.layout, PlanMemory())
            keys, values, _ = keys_in_order(k, v, plan.kv_order, False)
            stand_ins = None if plan.skipped is None else stand_ins_of(plan, q.dtype)
            operations = 4 * q.shape[-1] * plan.density() * q.shape[1] * plan.n_q * plan.n_kv
            chosen = forward_tiles(q, plan)
            for tiles in {chosen: None, **dict.fromkeys(self.tried)}:
                out, lse = results(q)
                scale = q.shape[-1] ** -0.5 * LOG2E

                def call(
                    tiles=tiles, out=out, lse=lse, plan=plan, keys=keys, values=values, skipped=stand_ins, scale=scale
                ):
                    launch_forward(
                        self.tensors[0], keys, values, out, lse, plan, plan.q_order, None, scale, tiles,
                        stand_ins=skipped,
                    )  # fmt: skip

                row = {"plan": name, "density": round(plan.density(), 3), "tiles": str(tuple(tiles)), "note": ""}
                try:
                    ms = self.milliseconds(call)
                    row |= {"ms": round(ms, 2), "TFLOP/s": round(operations / ms / 1e9)}
                except Exception as error:  # too much shared memory, say: a result, too
                    row |= {"ms": "", "TFLOP/s": "", "note": f"{type(error).__name__}: {str(error)[:70]}"}
                row["note"] = "chosen" if tiles == chosen else row["note"]
                yield row

    def variants(self) -> Iterator[dict]:
        """Whole calls with scores in int8 and with a second stage, and how far their outputs are from the plain one.

        Random tokens see all keys alike, so a second stage leaves out next to nothing: what it costs shows, and not
        what it saves.
        """
        from dataclasses import replace

        from vidaccel import sparse_attention
        from vidaccel.attention import PlanMemory

        q, k, v = self.tensors
        for name in ("radial", "tangent") if self.tried else ("radial",):
            plan = self.method(name).plan(q, k, v, self.layout, PlanMemory())
            plain = sparse_attention(q, k, v, plan, backend="triton")
            for variant, options in VARIANTS.items():
                formats = {key: value for key, value in options.items() if key != "pv_threshold"}
                used = replace(plan, pv_threshold=options.get("pv_threshold"))

                def call(used=used, formats=formats):
                    return sparse_attention(q, k, v, used, backend="triton", **formats)

                error = float((call() - plain).float().norm() / plain.float().norm())
                row = {"plan": name, "density": round(plan.density(), 3), "variant": variant}
                ms = statistics.median(time_calls(call, q.device, self.repeats, 5.0))
                yield {**row, "ms": round(ms, 2), "error": f"{error:.1e}"}

    def passes(self) -> Iterator[dict]:
        """What runs beside the forward kernel in a call over clusters."""
        from vidaccel.attention import PlanMemory
        from vidaccel.attention.kernels import kmeans, permute, probe, walk

        q, k, v = self.tensors
        plan = self.method("svg2").plan(q, k, v, self.layout, PlanMemory())
        mean = k.mean(2, keepdim=True).float()
        clusters = plan.selection[1].shape[-1]
        centers = k[:, :, :: max(1, k.shape[2] // clusters)][:, :, :clusters].float()
        labels = kmeans.assign(k, mean, centers)
        order, sizes = kmeans.in_clusters(labels, clusters)
        calls = {
            "copy of keys in order": lambda: permute.permute_rows(k, plan.kv_order),
            "walk": lambda: walk.make_walk(plan, 64, 64, 32),
            f"assignment to {clusters} clusters": lambda: kmeans.assign(k, mean, centers),
            "order of clusters": lambda: kmeans.in_clusters(labels, clusters),
            "means": lambda: kmeans.means_of(v, mean, order, sizes, centers),
        }
        for count in (100, 200, 400):
            q_means = q[:, :, :count].float()
            calls[f"probe of {count} centroids"] = lambda x=q_means: probe.probe_clusters(
                x, k, v, order, sizes, k.shape[-1] ** -0.5
            )
        for name, call in calls.items():
            yield {"pass": name, "ms": round(self.milliseconds(call), 3)}

    def planning(self) -> Iterator[dict]:
        """A warm call of each method, and the kernels that take most of it."""
        import torch

        from vidaccel.attention import PlanMemory

        q, k, v = self.tensors
        activity = torch.profiler.ProfilerActivity
        for name in DENSITIES:
            method, memory = self.method(name), PlanMemory()

            def call(method=method, memory=memory):
                return method.plan(q, k, v, self.layout, memory)

            ms = self.milliseconds(call)
            with torch.profiler.profile(activities=[activity.CUDA if q.is_cuda else activity.CPU]) as profile:
                call()
            key = "self_device_time_total" if q.is_cuda else "self_cpu_time_total"
            events = [(getattr(e, key) / 1000, e.count, e.key) for e in profile.key_averages()]
            events = sorted((e for e in events if e[0] > 0), reverse=True)
            row = {"method": name, "ms": round(ms, 2), "launches": sum(count for _, count, _ in events)}
            yield {**row, "kernel": "all", "kernel ms": round(sum(e[0] for e in events), 2)}
            for spent, count, kernel in events[:TOP]:
                text = kernel.replace("|", " ").replace("void at::native::", "")[:70]
                yield {**row, "kernel": f"{count} x {text}", "kernel ms": round(spent, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="wan-14b-720p")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--density", type=float, default=None, help="of all methods; for short sequences")
    parser.add_argument("--chosen", action="store_true", help="of the forward kernel only the chosen configuration")
    parser.add_argument("--fresh", action="store_true", help="do not go on with a call that was broken off")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import torch
    import triton

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch finds no CUDA device here; see above for one without.")
    find_package()
    if arguments.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(arguments.device))  # on whose stream events are recorded
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "interpreter"
    torch.set_grad_enabled(False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    page = arguments.out / f"kernels-{name.replace(' ', '-')}-{arguments.shape}.md"
    made_with = (
        f"`python benchmarks/kernels.py --shape {arguments.shape} --parts {' '.join(arguments.parts)}`; torch "
        f"{torch.__version__}, triton {triton.__version__}, {arguments.dtype}; medians of {arguments.repeats} with a "
        "cold L2 cache"
    )
    options = f"; --density {arguments.density}" + (", --chosen" if arguments.chosen else "")
    parts = Parts(page.with_suffix(".json"), arguments.parts, made_with + options, arguments.fresh)
    bench = Bench(SHAPES[arguments.shape], arguments)
    for part in parts.left:
        rows = []
        for row in getattr(bench, part)():
            print(*row.values(), flush=True)
            rows.append(row)
        parts.add(part, rows)
        text = [
            f"# Parts of a sparse call: {name}, {arguments.shape}",
            f"{made_with}. Tiles are queries, keys, warps, stages, keys of a tail, and whether keys come through "
            "tensor descriptors.",
        ]
        text += [f"## {known}\n\n{markdown_table(measured)}" for known, measured in parts.done.items()]
        text += [f"Not measured yet: {', '.join(parts.left)}."] if parts.left else []
        write_whole(page, "\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
