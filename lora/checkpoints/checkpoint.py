"""Checkpoints that are whole or absent: written beside, flushed to disk, then renamed."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shlex
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ...autoencoders.checkpoint_file import other_than_weights
from ...pipelines.files.plain_content import object_in
from ...pipelines.files.run_folder import ADAPTER, in_order, order_of
from ...pipelines.files.run_folder import CHECKPOINT as _PREFIX
from ...pipelines.files.run_folder import CHECKPOINT_FACTS as _FACTS
from ...pipelines.files.whole_files import NotWritten
from .written import Tensors, flush, replaced, save_text, write, write_tensors

logger = logging.getLogger(__name__)

_FORMAT = 2
"""1 had no checksums."""
_TENSORS = ("trained", "weights", "ema")
_FILES = (*(f"{name}.safetensors" for name in _TENSORS), "state.pt")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, or that belongs to another run; the message says what to do."""


@dataclass
class Checkpoint:
    """The state of a run after an optimiser step.

    Args:
        phase: name of the phase.
        step: optimiser steps done in it.
        total_steps: optimiser steps done in all phases.
        seconds: training time of the phase.
        trained: result of the phases before, by parameter name.
        weights: the parameters that this phase trains.
        ema: their exponential moving averages, empty without.
        state: optimiser, steps of the EMA and scaler; nested dicts and lists of tensors and numbers.
        random: states of the random generators, one entry a process.
    """

    phase: str
    step: int
    total_steps: int
    seconds: float
    trained: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    ema: Tensors = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    random: list[dict[str, Any]] = field(default_factory=list)

    @property
    def validation_due(self) -> bool:
        """Whether the validation after the step was cut off, and comes first when the run goes on."""
        return bool(self.state.get("validation_due", False))

    @property
    def _facts(self) -> dict[str, Any]:
        names = ("phase", "step", "total_steps", "seconds")
        return {"format": _FORMAT} | {name: getattr(self, name) for name in names}


class CheckpointFolder:
    """The checkpoints of a run, as folders `step_00000123`.

    Args:
        folder: where they lie.
        keep_last: how many stay.
        keep_adapters: of those that do not, the folder `adapter` does.

    Attributes:
        current: the checkpoint that the run in this process stands on: the one it was resumed from, wherever that lies,
            or the last one it wrote. None before the first. It need not be the last one in the folder, which may be of
            a run that went further before this one was resumed.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_adapters: bool = False) -> None:
        self.folder = Path(folder)
        self.keep_last, self.keep_adapters = keep_last, keep_adapters
        self.current: Path | None = None

    def saved(self) -> list[Path]:
        """The checkpoints in the order in which they were written, which need not be that of their steps.

        Each has its number in that order. Those of before there was one come first, by their steps. Those of which it
        cannot be read are `damaged`.
        """
        return in_order(path for path in self._there() if order_of(path) is not None)

    def damaged(self) -> list[Path]:
        """Checkpoints whose place among the others cannot be read any more: any of them may be the last one."""
        return sorted(path for path in self._there() if order_of(path) is None)

    def _there(self) -> list[Path]:
        found = self.folder.glob(f"{_PREFIX}*") if self.folder.is_dir() else ()
        return [path for path in found if (path / _FACTS).is_file()]

    def latest_of(self, phase: str, step: int) -> Path | None:
        """The last checkpoint that was written in a phase after so many steps of it, or fewer; None without any."""
        for path in reversed(self.saved()):
            try:
                facts = object_in(path / _FACTS)
                if facts["phase"] == phase and facts["step"] <= step:
                    return path
            except (OSError, ValueError, KeyError, TypeError):  # a damaged one is none to go on from
                continue
        return None

    def path(self, total_steps: int) -> Path:
        """Where the checkpoint after so many steps over all phases lies."""
        return self.folder / f"{_PREFIX}{total_steps:08d}"

    def how_to_resume(self) -> str:
        """The option that goes on from `current`; without one, from the start."""
        if self.current is None:
            return "start again without --resume"
        saved = self.saved()
        if saved and not self.damaged() and saved[-1].resolve() == self.current.resolve():
            return "continue with --resume latest"
        return f"continue with --resume {shlex.quote(str(self.current))}"

    def find(self, which: str | Path) -> Path:
        """The folder of "latest" or of a path.

        Raises:
            CheckpointError: there is none; or it is not known which is the latest, because one is damaged.
        """
        if str(which) == "latest":
            saved = self.saved()
            if damaged := self.damaged():
                earlier = f": resume from an earlier one, --resume {shlex.quote(str(saved[-1]))}" if saved else ""
                raise CheckpointError(
                    f"{damaged[-1]} is damaged ({_FACTS} cannot be read), and may be the latest{earlier}."
                )
            if not saved:
                raise CheckpointError(f"{self.folder} has no checkpoint to resume from: start without --resume.")
            return saved[-1]
        path = Path(which)
        if not (path / _FACTS).is_file():
            known = ", ".join(p.name for p in self.saved()) or "none"
            raise CheckpointError(f"{path} is no checkpoint (no checkpoint.json); in {self.folder}: {known}.")
        return path

    def save(self, checkpoint: Checkpoint, config: str, adapter: Callable[[Path, Tensors], None] | None = None) -> Path:
        """Write a checkpoint and its settings, then delete the oldest ones.

        Args:
            checkpoint: what to write.
            config: YAML.
            adapter: writes what is beside it, from its folder and the weights so far; as `Phase.write_adapter`.

        Raises:
            CheckpointError: it could not be written, for example because the disk is full; what was there before is
                untouched and nothing is left behind.
        """
        target = self.path(checkpoint.total_steps)
        try:
            with replaced(target) as draft:
                for name in _TENSORS:
                    write_tensors(draft / f"{name}.safetensors", getattr(checkpoint, name))
                with open(draft / "state.pt", "wb") as file:
                    torch.save({"state": checkpoint.state, "random": checkpoint.random}, file)
                    flush(file)
                write(draft / "config.yaml", config.encode())
                if adapter is not None:
                    adapter(draft, checkpoint.trained | (checkpoint.ema or checkpoint.weights))
                checksums = {name: _checksum(draft / name) for name in _FILES}
                facts = checkpoint._facts | {
                    "checksums": checksums,
                    "order": 1 + max((order_of(path) or 0 for path in self.saved()), default=0),
                }
                write(draft / _FACTS, json.dumps(facts, indent=2).encode())
        except (NotWritten, RuntimeError) as error:
            # torch.save reports a failed write as RuntimeError.
            told = error if isinstance(error, NotWritten) else NotWritten(target, error)
            last = "There is no earlier one." if self.current is None else f"The last good one is {self.current}."
            raise CheckpointError(f"the checkpoint {told} {last}") from error
        self.current = target
        for old in self.saved()[: -self.keep_last]:
            self._delete(old)
        return target

    def _delete(self, old: Path) -> None:
        """A checkpoint, or all of it but its adapter."""
        if not (self.keep_adapters and (old / ADAPTER).is_dir()):
            shutil.rmtree(old, ignore_errors=True)
            return
        # What makes it a checkpoint goes first.
        for file in (old / _FACTS, *(old / name for name in _FILES), old / "config.yaml"):
            with suppress(OSError):
                file.unlink()

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint onto the CPU.

        Raises:
            CheckpointError: a file is missing or damaged, or of another version of the format.
        """
        try:
            facts = object_in(path / _FACTS)
            validated = facts.pop("validated", False)
            for name in ("order", "global_batch"):  # the second of checkpoints of before; the settings say it, too
                facts.pop(name, None)
            if facts.pop("format") != _FORMAT:
                raise CheckpointError(f"{path} has another format than {_FORMAT}: use the version that wrote it.")
            checksums = facts.pop("checksums")
            if set(checksums) != set(_FILES):
                raise ValueError(f"{_FACTS} has checksums of {', '.join(map(str, checksums)) or 'no file'}")
            for name in _FILES:
                if _checksum(path / name) != checksums[name]:
                    raise ValueError(f"{name} does not hold what was written")
            _check_facts(facts)
            tensors: dict[str, Any] = {name: load_file(path / f"{name}.safetensors") for name in _TENSORS}
            # Mapped, so that the processes of a machine share it. Windows would then not let the file be deleted.
            other = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=os.name != "nt")
            held = {name: type(value) for name, value in other.items()} if isinstance(other, dict) else {}
            if held != {"state": dict, "random": list} or not other["random"]:
                raise ValueError("state.pt holds something other than a state")
            checkpoint = Checkpoint(**facts, **tensors, **other)
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            problem = f"state.pt holds {other_than_weights(error)}"
            raise CheckpointError(f"{path} is damaged ({problem}): resume from an earlier one.") from error
        except Exception as error:  # safetensors, pickle and zip each have their own
            raise CheckpointError(f"{path} is damaged ({error}): resume from an earlier one.") from error
        if validated:
            checkpoint.state["validation_due"] = False
        return checkpoint

    def validated(self) -> None:
        """Note in `current` that the validation that was due after it has been made."""
        assert self.current is not None
        path = self.current / _FACTS
        try:
            facts = object_in(path)
            save_text(json.dumps(facts | {"validated": True}, indent=2), path)
        except (OSError, ValueError) as error:
            logger.warning("%s A resume from there validates once more.", error)

    def clean(self) -> None:
        """Delete what an interrupted write left, and put back what it was about to replace."""
        for old in self.folder.glob(f".{_PREFIX}*.old.part"):
            target = old.with_name(old.name[1 : -len(".old.part")])
            if not target.exists():
                os.replace(old, target)
        for path in self.folder.glob(f".{_PREFIX}*.part"):
            shutil.rmtree(path, ignore_errors=True)


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise ValueError for what `Checkpoint._facts` cannot have been."""
    kinds = {"phase": str, "step": int, "total_steps": int, "seconds": float}
    if odd := sorted(set(facts) ^ set(kinds)):
        raise ValueError(f"{_FACTS} {'has' if odd[0] in facts else 'lacks'} {odd[0]}")
    for name, kind in kinds.items():
        if type(facts[name]) is not kind and not (kind is float and type(facts[name]) is int):
            raise ValueError(f"{name} in {_FACTS} is {facts[name]!r}")
    if not 0 <= facts["step"] <= facts["total_steps"]:
        raise ValueError(f"step in {_FACTS} is {facts['step']}, and total_steps {facts['total_steps']}")


def _checksum(path: Path) -> str:
    """CRC-32 of a file; neither safetensors nor torch look for damage that leaves the length."""
    value = 0
    with open(path, "rb") as file:
        while part := file.read(2**24):
            value = zlib.crc32(part, value)
    return f"{value:08x}"


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, numpy and torch, as numbers and tensors."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
