"""Several processes of one script, which talk by gloo, and what each of them made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

import vidaccel


def launch(script: Path, ranks: int, folder: Path, *given: str) -> list[Any]:
    """Run `script RANKS FOLDER *given`, which `start`s the processes; what each saved as `FOLDER/rank<RANK>.pt`.

    Raises:
        AssertionError: a process failed; with what all of them said.
    """
    (folder / "path").mkdir()
    (folder / "path" / "vidaccel").symlink_to(Path(vidaccel.__file__).parent, target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": str(folder / "path"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(script), str(ranks), str(folder), *given]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def start(main: Callable[..., None]) -> None:
    """In such a script: `main(rank, ranks, folder, *given)` in each process.

    Where processes can be forked, they are, since imports take longer than what is tested.
    """
    ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    how = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(main, (ranks, folder, *sys.argv[3:]), nprocs=ranks, start_method=how)


def text_of(error: type[Exception], call: Callable[[], object]) -> str:
    """What an error says that a call must raise."""
    try:
        call()
    except error as raised:
        return str(raised)
    return "nothing was raised"
