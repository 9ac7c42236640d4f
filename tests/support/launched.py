"""Several processes of one script, which talk by gloo, and what each of them made."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import vidaccel


def launch(script: Path, ranks: int, folder: Path, *given: str) -> list[Any]:
    """Run `script RANK RANKS FOLDER *given` once for each rank; each saves `FOLDER/rank<RANK>.pt`, which is returned.

    Raises:
        AssertionError: a process failed; with what all of them said.
    """
    (folder / "path").mkdir()
    (folder / "path" / "vidaccel").symlink_to(Path(vidaccel.__file__).parent, target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": str(folder / "path"), "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    start = [sys.executable, "-W", "ignore", str(script)]
    processes = [
        subprocess.Popen([*start, str(rank), str(ranks), str(folder), *given], env=environment, cwd=folder, **pipes)
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def text_of(error: type[Exception], call: Callable[[], object]) -> str:
    """What an error says that a call must raise."""
    try:
        call()
    except error as raised:
        return str(raised)
    return "nothing was raised"
