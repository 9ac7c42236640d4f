"""The log of a run: log.jsonl always, and a tracker of the user's choice."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.files.plain_content import json_of
from ..checkpoints.written import save_text
from ..config import ConfigError, flat
from ..settings import RunSettings
from . import wandb_run
from .progress import Progress
from .tensorboard_events import add_file, forget_from

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_VALIDATION = "validation_"
"""What the names of its numbers begin with."""


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
        progress: the terminal, on which a bar may be shown.
        done: steps over all phases that were done before, when a run is resumed. What the log has of later ones is
            removed when the run goes on, and not before (`goes_on`): one that was resumed from an earlier checkpoint
            and never trained has lost nothing.
        validates_again: whether the validation after `done` comes again, too.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: RunSettings,
        progress: Progress,
        done: int = 0,
        validates_again: bool = False,
    ) -> None:
        self.accelerator, self.progress = accelerator, progress
        self.path = Path(config.out) / "log.jsonl"
        self._done, self._validates_again, self._goes_on = done, validates_again, False
        self._validates_first = config.loop.validate_first
        if accelerator.log_with:
            simple = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in flat(config).items()}
            kinds = {str(getattr(kind, "value", kind)) for kind in accelerator.log_with}
            main = accelerator.is_main_process
            anew = main and self._tells_again()
            more = {"wandb": wandb_run.arguments(Path(config.out), main, anew)} if "wandb" in kinds else {}
            accelerator.init_trackers(config.loop.tracker_project or config.recipe, simple, more)

    def write(
        self, phase: str, step: int, total_steps: int, values: dict[str, float], steps: int, left: str = ""
    ) -> None:
        """Numbers of one step of a phase.

        Args:
            phase: its name.
            step, total_steps: done in the phase, and over all phases.
            values: the numbers.
            steps: that the phase has.
            left: the time that it still takes, in words.
        """
        if not self.accelerator.is_main_process:
            return
        # A gradient norm may be infinite, where float16 overflowed and the step was left out; JSON has no such number.
        numbers = {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in values.items()}
        row = {"phase": phase, "step": step, "total_steps": total_steps, **numbers}
        self.goes_on()
        try:
            _append(json.dumps(row) + "\n", self.path)
        except OSError as error:
            logger.error("%s could not be written: %s. The run goes on.", self.path, error)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        self.say(f"{time.strftime('%H:%M:%S')} {phase} {step}/{steps}  {shown}{f'  {left} left' if left else ''}")
        if self.accelerator.log_with:
            self.accelerator.log({f"{phase}/{k}": v for k, v in values.items()}, step=total_steps)

    def write_validation(self, phase: str, step: int, total_steps: int, values: dict[str, float], steps: int) -> None:
        """Numbers of the validation after a step, as `write` takes them."""
        self.write(phase, step, total_steps, {f"{_VALIDATION}{k}": v for k, v in values.items()}, steps)

    def show(self, phase: str, total_steps: int, folder: Path) -> None:
        """Give the pictures and videos of a validation, which are in its folder by the step, to the trackers that show
        such."""
        if not self.accelerator.is_main_process:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name not in ("tensorboard", "wandb"):
                continue
            for file in sorted(folder.glob(f"{total_steps:08d}*")):
                name = file.stem.removeprefix(f"{total_steps:08d}").strip("_") or "frames"
                tag = f"{phase}/validation/{name}"
                if tracker.name == "tensorboard":
                    add_file(tracker.writer, tag, file, total_steps)
                else:
                    wandb_run.add_file(tracker.run, tag, file, total_steps)

    def say(self, text: str) -> None:
        """A sentence for the user."""
        if self.accelerator.is_main_process:
            self.progress.say(text)

    def goes_on(self) -> None:
        """Forget what comes again: a number or a checkpoint of the run is written now."""
        if self._goes_on or not self.accelerator.is_main_process:
            return
        self._goes_on = True
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard" and self._done:
                forget_from(tracker.writer, self._done + 1)
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines() if self._stays(line)]
            if len(kept) < len(text.splitlines()):
                save_text("".join(f"{line}\n" for line in kept), self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.error("%s cannot be read or written: %s. The run goes on.", self.path, error)

    def close(self) -> None:
        """Close the tracker. The other processes may be anywhere."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def end(self) -> None:
        """Close the tracker at the end of a run, which every process has come to."""
        if self.accelerator.log_with:
            self.accelerator.end_training()

    def _tells_again(self) -> bool:
        """Whether the log has numbers that come again."""
        try:
            return not all(map(self._stays, self.path.read_text(encoding="utf-8", errors="replace").splitlines()))
        except OSError:
            return not self._done

    def _stays(self, line: str) -> bool:
        """Whether a line of the log is whole and does not come again."""
        try:
            row = json_of(line)
            step = row["total_steps"]
            validation = step == self._done and any(key.startswith(_VALIDATION) for key in row)
            # That before the first step of a phase is made whenever the phase begins.
            again = validation and (self._validates_again or (self._validates_first and not row["step"]))
            return step <= self._done and not again
        except (ValueError, KeyError, TypeError, AttributeError):
            return False


def _append(row: str, path: Path) -> None:
    """A line at the end of a file, or nothing: what a full disk took of it would make one with the next.

    Raises:
        OSError: it cannot be written.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(row.encode())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


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

    def state(self, accelerator: Accelerator) -> dict[str, dict[str, float]]:
        """What was added since the last `take`, over all processes, for `restore`; every process must call this."""
        names = sorted(self._sums)
        sums = _over_all([float(self._sums[name]) for name in names], accelerator)
        return {"sums": dict(zip(names, sums, strict=True)), "counts": dict(self._counts)}

    def restore(self, state: dict[str, dict[str, float]]) -> None:
        """Go on from a `state`, in any number of processes."""
        self._sums = dict(state["sums"])
        self._counts = {name: int(count) for name, count in state["counts"].items()}

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all processes since the last call; every process must call this."""
        means = {name: float(total) / self._counts[name] for name, total in sorted(self._sums.items())}
        self._sums, self._counts = {}, {}
        return dict(zip(means, _over_all(list(means.values()), accelerator), strict=True))


def _over_all(values: list[float], accelerator: Accelerator) -> list[float]:
    """The mean of each number over all processes."""
    if accelerator.num_processes == 1 or not values:
        return values
    import torch

    return accelerator.reduce(torch.tensor(values, device=accelerator.device), "mean").tolist()
