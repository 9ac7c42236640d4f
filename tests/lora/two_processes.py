"""Started by `accelerate launch`: a run of which every process keeps its own copy of the result."""

from __future__ import annotations

import sys

import torch

from vidaccel.lora import run
from vidaccel.lora.phase_run import PhaseRun

torch.set_num_threads(1)


def main(recipe: str, config: str, out: str, *more: str) -> None:
    original = PhaseRun._result

    def result(self):
        whole = original(self)
        if self.step == self.settings.steps:
            torch.save(whole, f"{out}/rank{self.accelerator.process_index}.pt")
        return whole

    PhaseRun._result = result
    resume = more[0] if more else None
    run(recipe, config, [f"out={out}"], resume)


if __name__ == "__main__":
    main(*sys.argv[1:])
