"""Started with a file of jobs and a port: runs of two processes, each of which keeps its own copy of the result.

They have the environment that `accelerate launch` gives; `stopped_processes.py` is started by it. Where processes can
be forked, they are, since imports take longer than the runs.

A job has `recipe`, `config`, `out`, and may have `stop_after`: after so many steps the second process alone gets
SIGTERM, and the run is resumed. With `encode_only` it fills the caches and ends. With `fast_clock` the clock of the
second process runs so many times as fast, as clocks of processes do that measure different waits.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401 - what the runs import, before processes are forked
import peft  # noqa: F401
import torch
import torch.multiprocessing
from diffusers import WanPipeline  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from short_texts import shorten

from vidaccel.lora import phase_run, run
from vidaccel.lora.phase_run import PhaseRun
from vidaccel.lora.recipes import measured_clips
from vidaccel.lora.recipes.flow_phase import FlowPhase
from vidaccel.lora.stopping import Stopped

torch.set_num_threads(1)
shorten()
original_train, original_step, original_rate = PhaseRun.train, PhaseRun._one_step, phase_run.set_learning_rate
original_sample, original_stacked = FlowPhase.sample, measured_clips._stacked


class FastClock:
    """The module `time`, as `phase_run` uses it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def perf_counter(self) -> float:
        return self.factor * time.perf_counter()


PROCESSES = 2


def main(rank: int, jobs: str, port: str) -> None:
    number, count = str(rank), str(PROCESSES)
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    for job in json.loads(Path(jobs).read_text()):
        gc.freeze()  # what was imported: `accelerate` has garbage collected at the end of every phase
        left = job.get("stop_after", 0)
        rates: list[float] = []
        done = {"videos": 0, "batches": 0}
        second = os.environ["RANK"] == "1"
        phase_run.time = FastClock(job["fast_clock"]) if second and "fast_clock" in job else time

        def train(self, keep=True, rates=rates, second=second, done=done):
            found = original_train(self, keep)
            assert keep or (second and not found), "a copy of all weights in a process that needs none"
            torch.save(self.state.result(), f"{self.context.out}/rank{self.process.index}.pt")
            frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
            assert frozen <= set(self.model.parameters_to_ignore), "weights that are not trained were sent"
            (Path(self.context.out) / f"done{self.process.index}.json").write_text(json.dumps(done))
            torch.save(rates, f"{self.context.out}/rates{self.process.index}.pt")
            return found

        def sample(self, *given, done=done):
            done["videos"] += 1
            return original_sample(self, *given)

        def stacked(clips, done=done):
            done["batches"] += 1
            return original_stacked(clips)

        def set_rate(optimizer, rate, rates=rates):
            rates.append(rate)
            original_rate(optimizer, rate)

        def step(self, stream):
            nonlocal left
            values = original_step(self, stream)
            left -= 1
            if left == 0 and self.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return values

        PhaseRun.train, PhaseRun._one_step, phase_run.set_learning_rate = train, step, set_rate
        FlowPhase.sample, measured_clips._stacked = sample, stacked
        overrides = [f"out={job['out']}"]
        if left:
            try:
                run(job["recipe"], job["config"], overrides)
                raise AssertionError("the run was not stopped")
            except Stopped:
                run(job["recipe"], job["config"], overrides, "latest")
        else:
            run(job["recipe"], job["config"], overrides, encode_only=job.get("encode_only", False))


if __name__ == "__main__":
    start = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(main, tuple(sys.argv[1:]), nprocs=PROCESSES, start_method=start)
