"""Started by `accelerate launch`: a run that ends only when it is stopped, in a step or while clips are encoded."""

from __future__ import annotations

import sys
import time

import torch
from conftest import TinyPhase, TinyRecipe, TinySettings

from vidaccel.lora.config import build
from vidaccel.lora.distributed.processes import Process, host_group
from vidaccel.lora.stopping import Stopped
from vidaccel.lora.trainer import Trainer, make_accelerator

torch.set_num_threads(1)


def take_long(process: Process) -> None:
    """Until there is a signal."""
    print(f"process {process.index} takes long", flush=True)
    while not process.stop.requested:
        time.sleep(0.01)


class TrainingPhase(TinyPhase):
    """The first micro-batch of the second step lasts until the signal, and the others longer than a launcher waits."""

    waited = False

    def loss(self, model, batch, rng):
        if rng.places[0].step == 1:
            if self.waited:
                time.sleep(60)
            take_long(self.recipe.process)
            self.waited = True
        return super().loss(model, batch, rng)


class ValidatingPhase(TinyPhase):
    def validate(self, model, folder, step):
        take_long(self.recipe.process)
        self.recipe.process.check_stop()
        time.sleep(60)


class EncodingPhase(TinyPhase):
    def clips(self):
        process = self.recipe.process
        if process.is_main:
            print(f"process {process.index} encodes", flush=True)
            while True:
                time.sleep(0.01)
        print(f"process {process.index} waits", flush=True)
        process.wait()
        raise AssertionError("unreachable")


PHASES = {"train": TrainingPhase, "validate": ValidatingPhase, "encode": EncodingPhase}


def main(mode: str, out: str) -> None:
    class OnePhase(TinyRecipe):
        def phases(self):
            return [PHASES[mode]("first", self.config.phases.first, self)]

    loop = {"tracker": "none", "device": "cpu", "log_every": 1, "validate_every": 1 if mode == "validate" else 0}
    first = {"steps": 3, "batch_size": 1, "gradient_accumulation_steps": 3}
    settings = build(TinySettings, {"recipe": "tiny", "out": out, "loop": loop, "phases": {"first": first}})
    accelerator = make_accelerator(settings)
    process = Process(accelerator.device, accelerator.process_index, 2, host_group(2))
    try:
        Trainer(OnePhase(settings, process), accelerator).run()
    except Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
