"""Adapters that a run began from, which may be those of another run that goes on meanwhile.

What `lora.start` holds is in every checkpoint of the run, so it is looked at when the run begins and not again. A
teacher is needed at every resume, and its file is kept with the run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ...pipelines.files.run_folder import FILE
from ...pipelines.files.whole_files import staged, writing
from ..config import ConfigError, flat

if TYPE_CHECKING:
    from ..recipes.base import Recipe

START, TEACHER = "lora.start", "consistency.teacher"
KEPT = frozenset((START, TEACHER))
"""Settings that name such adapters."""
KEPT_TEACHER = "teacher"
"""The folder of the teacher's adapter, in that of the run."""


def named_anew(recipe: Recipe, setting: str) -> bool:
    """Whether a setting names what has to be looked at: in a new run, or otherwise than in the checkpoint.

    Args:
        recipe: with `continues` and `began_with` of the run that is continued.
        setting: whose value is a place, or None.

    Raises:
        ConfigError: the run that is continued began without one.
    """
    now = flat(recipe.config)[setting]
    if now is None or recipe.continues is None:
        return now is not None
    if setting not in (recipe.began_with or {}):
        raise ConfigError(
            f"{setting} is {now}, and the run that is continued began without: leave it out, or begin a new run in "
            "another `out`."
        )
    return bool(now != flat(recipe.continues)[setting])


def kept_teacher(out: str | Path) -> Path:
    """The file of the teacher's adapter that a run keeps, which need not be there."""
    return Path(out) / KEPT_TEACHER / FILE


def teacher_of(checkpoint: Path | None, out: str | Path) -> Path | None:
    """The file of the teacher's adapter that was kept with a run.

    Args:
        checkpoint: that is continued, maybe in another `out` than that of its run; None for a new run, which has none.
        out: of the run.

    Returns:
        None where it was not kept, as older versions did not.
    """
    if checkpoint is None:
        return None
    of_run = checkpoint.resolve().parent.parent
    return next((file for file in map(kept_teacher, (of_run, out)) if file.is_file()), None)


def kept(checkpoint: Path | None, out: str | Path) -> frozenset[str]:
    """Of which settings in `KEPT` a run has what it needs; see `teacher_of`."""
    return frozenset((START,) if teacher_of(checkpoint, out) is None else KEPT)


def keep_teacher(file: Path, out: str | Path) -> None:
    """Keep the adapter of a teacher with the run.

    Raises:
        NotWritten: it cannot be read any more, or not be written.
    """
    target = kept_teacher(out)
    if file.resolve() != target.resolve():
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with staged(target) as draft:
                shutil.copyfile(file, draft)
