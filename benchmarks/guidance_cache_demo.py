"""The guidance cache on the built-in model: what each setting gives and costs on all 64 held-out prompts.

    python benchmarks/guidance_cache_demo.py                 # an hour or two on a CPU; call it again to go on
    python benchmarks/guidance_cache_demo.py --prompts 8

Each held-out prompt is made as it is and with each setting, from one seed, one after the other in one process and on
one thread: passes of the transformer, CPU-seconds, how near each video is to the one with both passes in all steps, and
whether it shows all that the prompt says. Beside it, what else would save as many passes: fewer steps, the difference
kept as it was (as in FasterCache's CFG-Cache), and a cache over steps. Results go to
`benchmarks/results/guidance_cache_demo*`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS
from lever_rows import Row, run


def rows_of() -> dict[str, Row]:
    """What is measured, by name."""
    from vidaccel import GuidanceCache
    from vidaccel.pipelines.presets import Cache

    def cached(scale: float = 2.0, cache: Cache | None = None, **settings: Any) -> Row:
        own = (("guidance_cache", GuidanceCache(**settings)),)
        return Row(scale, preset=own if cache is None else (*own, ("cache", cache)))

    return {
        "both passes in all steps": Row(),
        "every 2": cached(every=2),
        "every 3 (default)": cached(),
        "every 4": cached(every=4),
        "every 3, difference kept": cached(extrapolation=0.0),
        "every 3, extrapolated in full": cached(extrapolation=1.0),
        "15 steps instead of 20": Row(steps=15),
        "seacache": Row(preset=(("cache", Cache("seacache")),)),
        "seacache, every 3": cached(cache=Cache("seacache")),
        "guidance 4: both passes": Row(4.0),
        "guidance 4: every 2": cached(4.0, every=2),
        "guidance 4: every 3": cached(4.0),
    }


def main(
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, and write guidance_cache_demo.jsonl (prompt by prompt), guidance_cache_demo.csv and .md."""
    about = (
        "PSNR is the mean over the prompts, to the video of both passes in all 20 steps at the same guidance scale, "
        "and the lowest of all."
    )
    run("guidance_cache_demo", "Guidance cache on the built-in model", about, rows_of(), "both passes", prompts, out)


if __name__ == "__main__":
    typer.run(main)
