"""What both training loops share: settings, averaged weights, learning rate, checkpoints and the log.

All randomness of a step is derived from (seed, step), so a run that was interrupted continues as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class LoopConfig:
    """Settings of a training loop.

    Args:
        steps: optimiser steps in the whole run.
        learning_rate, warmup: peak rate, and the steps in which it rises linearly to it; it then falls by a cosine.
        weight_decay, clip: of AdamW, and the bound of the gradient norm.
        ema_decay: decay of the averaged weights, which are the ones that are shipped.
        seed: of everything random.
        device: "cpu" or "cuda".
        bf16: compute the forward pass under bfloat16 autocast.
        save_every, log_every: steps.

    Raises:
        ValueError: for counts under 1 or rates outside their bounds.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    save_every: int = 500
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay is {self.ema_decay}, but must be in [0, 1): use 0 for no averaging")
        if self.learning_rate <= 0.0:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be above 0")


def learning_rate(step: int, config: LoopConfig) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak at the last step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def step_seed(seed: int, step: int) -> int:
    """One seed for each (run, step)."""
    return (seed * 1_000_003 + step) % (2**63)


class Average:
    """Exponential moving average of the weights of a module; the decay warms up, so early weights fade fast."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    def update(self, module: nn.Module, step: int) -> None:
        import torch

        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in module.state_dict().items():
                self.weights[key].lerp_(value.detach().float(), 1 - decay)


class Log:
    """One JSON object a line, appended; also printed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.perf_counter()

    def write(self, **row: Any) -> None:
        row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def save_checkpoint(
    path: Path, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer, step: int, **extra: Any
) -> None:
    """Write beside the file, then rename: a checkpoint is whole or absent."""
    import torch

    state = {"model": module.state_dict(), "average": average.weights, "optimizer": optimizer.state_dict()}
    beside = path.with_suffix(".tmp")
    torch.save(state | {"step": step} | extra, beside)
    os.replace(beside, path)


def load_checkpoint(path: Path, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer) -> dict:
    """Restore in place; returns the whole checkpoint (`step` is the next one to run)."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["model"])
    for key, value in state["average"].items():
        average.weights[key].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return state
