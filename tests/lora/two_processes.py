"""Started by `accelerate launch` with a file of jobs: runs of which every process keeps its own copy of the result.

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

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from short_texts import shorten

from vidaccel.lora import phase_run, run
from vidaccel.lora.phase_run import PhaseRun
from vidaccel.lora.stopping import Stopped

torch.set_num_threads(1)
shorten()
original_train, original_step, original_rate = PhaseRun.train, PhaseRun._one_step, phase_run.set_learning_rate


class FastClock:
    """The module `time`, as `phase_run` uses it."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def perf_counter(self) -> float:
        return self.factor * time.perf_counter()


def main(jobs: str) -> None:
    for job in json.loads(Path(jobs).read_text()):
        gc.freeze()  # what was imported: `accelerate` has garbage collected at the end of every phase
        left = job.get("stop_after", 0)
        rates: list[float] = []
        second = os.environ["RANK"] == "1"
        phase_run.time = FastClock(job["fast_clock"]) if second and "fast_clock" in job else time

        def train(self, rates=rates):
            whole = original_train(self)
            torch.save(whole, f"{self.context.out}/rank{self.process.index}.pt")
            frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
            assert frozen <= set(self.model.parameters_to_ignore), "weights that are not trained were sent"
            torch.save(rates, f"{self.context.out}/rates{self.process.index}.pt")
            return whole

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
    main(sys.argv[1])
