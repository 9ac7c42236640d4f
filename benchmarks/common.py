"""What the benchmark scripts share: where results go, who measured, and how rows and tables are read and written."""

from __future__ import annotations

import contextlib
import csv
import importlib
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
UNFINISHED = 75  # EX_TEMPFAIL: what a script ends with whose time was up, and which goes on when it is called again


def environment_line(device: str = "cpu") -> str:
    """Versions and hardware in one line."""
    import torch

    from vidaccel.generation.machine import environment

    return ", ".join(f"{name} {value}" for name, value in environment(torch.device(device)).items())


def version_of(module: str) -> str | None:
    """What a module says of itself, None where it is not installed.

    Not by the name of the distribution, of which a module can have several: that of triton is `pytorch-triton-rocm` on
    ROCm and `triton-windows` on Windows.
    """
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return str(importlib.import_module(module).__version__)
    except Exception as error:  # it is named as it is; the script that needs it will say more
        return f"that cannot be used ({type(error).__name__})"


def gpu_and_versions() -> str:
    """What a measurement is of: that of another is not to be gone on with."""
    import torch

    versions = {name: version_of(name) for name in ("torch", "triton", "diffusers")}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return ", ".join([gpu, *(f"{name} {version}" for name, version in versions.items() if version is not None)])


def read_rows(path: Path, *, to_append: bool = False) -> list[dict[str, Any]]:
    """The rows of a file with a JSON object a line; none where there is no file.

    A process that was killed while it wrote leaves half a row at the end. It is left out, with a warning.

    Args:
        to_append: the caller is about to append rows: half a one is cut off the file, or the next would run into it.

    Raises:
        ValueError: another line is no JSON.
    """
    content = path.read_bytes() if path.is_file() else b""
    lines, rows = content.splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines) or content.endswith(b"\n"):
                raise ValueError(f"{path}:{number} is no JSON ({error}): delete that line.") from error
            warnings.warn(f"{path} ends with half a row, of a run that was killed: it is left out.", stacklevel=2)
    if to_append and not content.endswith(b"\n") and content:
        write_whole(path, b"\n".join([*lines[: len(rows)], b""]).decode())
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file that `read_rows(..., to_append=True)` has read."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def write_whole(path: Path, text: str) -> None:
    """A file that is the old one or the new one at any moment: written beside its place, then put there."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(beside, path)


def _object_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where it is none, or not there."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


class Parts:
    """What a script measures in parts, kept after each, so that a call that was broken off is gone on with.

    A call that came to its end is not gone on with: the next one measures all parts anew.

    Args:
        file: a JSON object: `made_with`, `left` (the parts to come), and the parts by name.
        names: of all parts, in their order.
        made_with: machine, versions and settings. What was measured with others is not gone on with.
        fresh: nothing is gone on with.

    Attributes:
        done: what was measured of each part that is done.
    """

    def __init__(self, file: Path, names: Sequence[str], made_with: str, fresh: bool = False) -> None:
        self.file, self.names, self.made_with = file, names, made_with
        found = {} if fresh else _object_in(file)
        goes_on = found.get("left") and found.get("made_with") == made_with
        self.done: dict[str, Any] = {name: found[name] for name in names if name in found} if goes_on else {}
        if self.done:
            print(
                f"{file} is of a call that was broken off, and is gone on with (--fresh: not): {', '.join(self.done)}"
            )

    @property
    def left(self) -> list[str]:
        """The parts that are to come."""
        return [name for name in self.names if name not in self.done]

    def add(self, name: str, measured: Any) -> None:
        """Keep what was measured of a part."""
        self.done[name] = measured
        kept = {"made_with": self.made_with, "left": self.left, **self.done}
        write_whole(self.file, json.dumps(kept, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A table, the columns those of its first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def write_markdown(path: Path, title: str, text: str, *tables: list[dict]) -> None:
    """A page of a text and tables."""
    write_whole(path, "\n\n".join([f"# {title}", text, *map(markdown_table, tables)]) + "\n")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """A table, the columns those of its first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows])
