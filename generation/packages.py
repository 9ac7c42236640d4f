"""Packages that a copy of this folder may lack: pip installs them with the package, and ComfyUI does not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path

COMMAND_LINE = Path(__file__).resolve().parents[1] / "requirements-command-line.txt"
SHOWING = ("packaging", "rich", "typer")
"""What the command line cannot even show its help without."""


class MissingPackages(RuntimeError):
    """Packages are not there, or too old."""


def lacking(file: Path, more: Sequence[str] = (), only: Collection[str] = ()) -> list[str]:
    """The requirements that are not met, each with what was found instead.

    Args:
        file: of requirements, as pip takes it. Where there is none, pip installed the package and has seen to it.
        more: requirements beside it.
        only: names of those in the file that count; empty for all.
    """
    if not file.is_file():
        return []
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # what reads the lines is one of them
        return ["packaging (not installed)"]
    wrong = []
    for line in (*requirements_in(file), *more):
        needed = Requirement(line)
        if only and needed.name not in only:
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{needed} (not installed)")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed} (found {found})")
    return wrong


def check_command_line(only: Collection[str] = ()) -> None:
    """Raise MissingPackages for what the command line lacks; `only` as for `lacking`."""
    if wrong := lacking(COMMAND_LINE, only=only):
        raise MissingPackages(f"this needs {', '.join(wrong)}: pip install -r {COMMAND_LINE}, with this Python.")


def requirements_in(file: Path) -> Iterator[str]:
    """The requirements of a file and of those that it takes in, one by one."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            yield from requirements_in(file.parent / line.removeprefix("-r ").strip())
        elif line and not line.startswith("#"):
            yield line
