"""The log of a run: log.jsonl always, and a tracker of the user's choice."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ConfigError, flat
from .settings import RunSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def choose_tracker(name: str) -> str | None:
    """The tracker for `accelerate.Accelerator(log_with=...)`.

    Raises:
        ConfigError: one that accelerate does not know or that is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import is_tensorboard_available

    if name == "none":
        return None
    if name == "auto":
        if is_tensorboard_available():
            return "tensorboard"
        logger.info("tensorboard is not installed (pip install tensorboard): the numbers go to log.jsonl alone.")
        return None
    known = [str(getattr(key, "value", key)) for key in LOGGER_TYPE_TO_CLASS]
    if name not in known:
        raise ConfigError(f"loop.tracker is {name!r}: use auto, none, or one of {', '.join(sorted(known))}.")
    installed = is_tensorboard_available() if name == "tensorboard" else importlib.util.find_spec(name) is not None
    if not installed:
        raise ConfigError(f"loop.tracker is {name}, which is not installed: pip install {name}, or use auto.")
    return name


class Tracker:
    """Writes numbers by step; in processes other than the main one it does nothing.

    Args:
        accelerator: with its tracker.
        config: of the run.
    """

    def __init__(self, accelerator: Accelerator, config: RunSettings) -> None:
        self.accelerator = accelerator
        self.path = Path(config.out) / "log.jsonl"
        self.step = 0
        if accelerator.log_with:
            simple = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in flat(config).items()}
            accelerator.init_trackers(config.recipe, config=simple)

    def write(self, phase: str, step: int, total_steps: int, values: dict[str, float]) -> None:
        """Numbers of one step of a phase."""
        if not self.accelerator.is_main_process:
            return
        row = {"phase": phase, "step": step, **{k: round(v, 6) for k, v in values.items()}}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            logger.error("%s could not be written: %s. The run goes on.", self.path, error)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        print(f"{time.strftime('%H:%M:%S')} {phase} {step}  {shown}", flush=True)
        if self.accelerator.log_with:
            self.accelerator.log({f"{phase}/{k}": v for k, v in values.items()}, step=total_steps)

    def say(self, text: str) -> None:
        """A sentence for the user."""
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def close(self) -> None:
        if self.accelerator.log_with:
            self.accelerator.end_training()


class Means:
    """Running means of numbers that may still be on a GPU, fetched only when they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            value = value.detach().float() if hasattr(value, "detach") else value
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last call; every process must call this."""
        means = {name: float(total) / self._counts[name] for name, total in sorted(self._sums.items())}
        self._sums, self._counts = {}, {}
        if accelerator.num_processes == 1 or not means:
            return means
        import torch

        reduced = accelerator.reduce(torch.tensor(list(means.values()), device=accelerator.device), "mean")
        return dict(zip(means, reduced.tolist(), strict=True))
