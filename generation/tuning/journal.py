"""What was measured so far, on disk: an interrupted `tune` goes on with it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...pipelines.errors import shortened
from ...pipelines.files.plain_content import json_of
from ...pipelines.files.whole_files import writing
from ..errors import BadInput

VERSION = 1
FILE = "journal.jsonl"


class Journal:
    """A file of measurements, one a line, each written before the next begins. The budget is in none of them, so that
    another budget goes on with the same.

    Args:
        folder: that it is in; made where it is not there.
        identity: what the measurements are of, name -> value: a journal of something else is refused.

    Raises:
        BadInput: a journal of something else, with the differences; or one that cannot be read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.file = folder / FILE
        self._known: dict[str, Any] = {}
        head = {"version": VERSION, **json.loads(json.dumps(identity))}
        folder.mkdir(parents=True, exist_ok=True)
        if not self.file.is_file() or not self._read(head):
            self._append({"head": head}, "w")

    def _read(self, head: dict[str, Any]) -> bool:
        """Take what is there; whether there was anything."""
        try:
            text = self.file.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]  # a line that was being written when the process ended is not there
            lines = [json_of(line) for line in whole.splitlines()]
            found = dict(lines[0]["head"]) if lines else None
            self._known = {line["key"]: line["value"] for line in lines[1:]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"its {FILE} cannot be read ({error})"
            raise BadInput("out", problem, "Give another folder, or remove it.", value=self.file.parent) from error
        if found is None:
            return False
        if unknown := [name for name in head if name not in found]:
            problem = f"it was written by an earlier version, which did not note {' and '.join(unknown)}"
            raise BadInput("out", problem, "Give another folder, or remove it.", value=self.file.parent)
        if told := "; ".join(_differing(found, head)):
            raise BadInput(
                "out",
                f"it holds measurements of something else: {told}",
                "Give another folder, or the same settings.",
                value=self.file.parent,
            )
        if len(whole) < len(text):
            with self.file.open("rb+") as file:
                file.truncate(len(whole))
        return True

    def get(self, key: str) -> Any:
        """A measurement, None where there is none."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Write a measurement."""
        self._append({"key": key, "value": value}, "a")
        self._known[key] = value

    def __len__(self) -> int:
        return len(self._known)

    def _append(self, line: dict[str, Any], mode: str) -> None:
        with writing(self.file), self.file.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def kept(folder: Path) -> int:
    """Measurements in a folder's journal; 0 where there is none."""
    try:
        return max((folder / FILE).read_bytes().count(b"\n") - 1, 0)  # the first line is its head
    except OSError:
        return 0


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What was one thing and is another, in words; of values that have names themselves, those that differ."""
    for name in {**now, **before}:
        was, is_ = before.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(is_, dict):
            yield from (f"{name}: {told}" for told in _differing(was, is_))
        elif was != is_:
            yield f"{name} was {_short(was)} and is {_short(is_)}"


def _short(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), 80)
