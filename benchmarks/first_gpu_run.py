"""Everything that wants a GPU, the most valuable first, in one command that may be broken off and called again.

    python benchmarks/first_gpu_run.py                         # on the GPU that is there
    python benchmarks/first_gpu_run.py --seconds 500           # what is not done by then, the next call goes on with
    python benchmarks/first_gpu_run.py --toy                   # on a CPU in Triton's interpreter: whether it runs

Steps: the kernels' tests, the parts of a sparse call (`kernels.py`), attention against other implementations
(`attention.py`), a denoising step (`step.py`), and quality on the demo model (`quality.py`). Each is a process of its
own. In `benchmarks/results/gpu` are what each printed (`STEP.log`), what is done (`done.json`) and, after each step,
what was expected beside what was measured (`targets.md`). A step that fails is said and does not keep the others from
running; one that was stopped is begun again by the next call, and goes on with what it had written where it can. On
another GPU, and with other versions of torch, triton or diffusers, all is measured anew.
`step.py` and `quality.py` need diffusers.
"""

from __future__ import annotations

import argparse  # not typer: machines with a GPU to measure on often have torch and nothing else
import importlib.util
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import gpu_targets

HERE = Path(__file__).parent
ROOT = HERE.parent
ROWS = ("attention.jsonl", "quality.jsonl")  # what two of the scripts go on from
# Name, what Python runs, and seconds after which it is stopped, None for never. `{out}` is the folder of the results.
STEPS = (
    ("tests", "-m pytest -q -p no:cacheprovider -m gpu {root}/tests/attention/kernels", 300),
    ("kernels", "{here}/kernels.py --out {out}", 240),
    ("attention-14b", "{here}/attention.py --shapes wan-14b-720p --densities .25 .1 .05 --repeats 10 --out {out}", 300),
    ("step-14b", "{here}/step.py --model wan-14b --height 720 --width 1280 --layers 8 --density .1 --out {out}", 240),
    ("step-1.3b", "{here}/step.py --model wan-1.3b --density .2 --out {out}", 180),
    ("quality", "{here}/quality.py --device cuda --seconds 300 --out {out}", 420),
    ("attention-1.3b", "{here}/attention.py --shapes wan-1.3b-480p --repeats 10 --out {out}", 240),
    ("attention-hunyuan", "{here}/attention.py --shapes hunyuan-720p --densities .25 .1 --repeats 5 --out {out}", 240),
    ("backward", "{here}/attention.py --shapes wan-1.3b-480p --backward --densities .25 --repeats 5 --out {out}", 200),
    ("cogvideox", "{here}/kernels.py --shape cogvideox --parts forward variants --out {out}", 150),
)
TOY = (
    ("kernels", "{here}/kernels.py --shape toy --density .8 --device cpu --dtype float32 --repeats 1 --chosen "
                "--parts forward variants --out {out}", None),
)  # fmt: skip


def run(name: str, words: str, limit: float | None, out: Path, environment: dict[str, str]) -> str:
    """One step, stopped after `limit` seconds; "done", or what went wrong."""
    command = [sys.executable, *(word.format(here=HERE, root=ROOT, out=out) for word in words.split())]
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    return "done" if code == 0 else f"exit code {code}"


def machine(toy: bool) -> str:
    """What the measurements are of: those of another are not to be gone on with."""
    import torch

    packages = [f"{name} {metadata.version(name)}" for name in ("torch", "triton", "diffusers") if _installed(name)]
    gpu = "the interpreter" if toy or not torch.cuda.is_available() else torch.cuda.get_device_name()
    return ", ".join([gpu, *packages])


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1500, help="after which it ends (25 minutes by default)")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="do again what is done")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    state = arguments.out / "done.json"
    before, here = json.loads(state.read_text()) if state.exists() else {}, machine(arguments.toy)
    anew = arguments.fresh or before.get("machine") != here
    if before and anew:
        print(f"{arguments.out} is of {before.get('machine')}: all is measured anew for {here}", flush=True)
        for name in ROWS:
            (arguments.out / name).unlink(missing_ok=True)
    done = {"machine": here} if anew else before
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if arguments.toy else {})}
    begin = time.perf_counter()
    for name, words, limit in TOY if arguments.toy else STEPS:
        if done.get(name) == "done":
            continue
        start = time.perf_counter()
        left = arguments.seconds - (start - begin)
        if left <= 0:
            print("the time is up; call again to go on", flush=True)
            return
        done[name] = run(name, words, left if limit is None else min(limit, left), arguments.out, environment)
        beside = state.with_suffix(".partial")
        beside.write_text(json.dumps(done, indent=1) + "\n")
        os.replace(beside, state)
        gpu_targets.write(arguments.out)
        print(f"{name}: {done[name]}, {time.perf_counter() - start:.0f} s", flush=True)
    if any(what != "done" for name, what in done.items() if name != "machine"):
        sys.exit(1)


if __name__ == "__main__":
    main()
