"""A run in Weights & Biases: its name and number, which a resumed run keeps, and pictures and videos."""

from __future__ import annotations

import importlib
import uuid
from pathlib import Path
from typing import Any

from ..checkpoints.written import save_text

_NUMBER = "wandb_id.txt"
"""In the folder of the tracker: what wandb knows the run by."""


def arguments(out: Path, main: bool, anew: bool) -> dict[str, Any]:
    """Arguments of `wandb.init` for the run in `out`: the same for one that is resumed there, so that wandb goes on
    with it and does not begin another.

    Args:
        out: folder of the run; its name is the run's.
        anew: steps come again that the run has told already. wandb drops these, so it gets another run of that name.
        main: whether this is the main process, which keeps the number, and the only one to ask wandb for a run.

    Raises:
        NotWritten: the number cannot be kept in `out`.
    """
    if not main:
        return {}
    file = out / "tracker" / _NUMBER
    number = file.read_text(encoding="utf-8").strip() if file.is_file() and not anew else ""
    if not number:
        number = uuid.uuid4().hex[:16]  # not of `random`, whose state is the training's
        save_text(f"{number}\n", file)
    return {"name": out.resolve().name, "id": number, "resume": "allow", "dir": str(file.parent)}


def add_file(run: Any, tag: str, file: Path, step: int) -> None:
    """Show a PNG or an MP4 of a validation.

    Args:
        run: what `wandb.init` gave.
        tag: under which it is shown.
        file: to add; others than these two kinds are left out.
        step: of the validation.
    """
    if file.suffix not in (".png", ".mp4"):
        return
    wandb = importlib.import_module("wandb")
    shown = wandb.Image(str(file)) if file.suffix == ".png" else wandb.Video(str(file), format="mp4")
    run.log({tag: shown}, step=step)
