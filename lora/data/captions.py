"""Captions of the files of a folder: in `metadata.jsonl` or `metadata.csv`, or in a text file beside each."""

from __future__ import annotations

import csv
import io
import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...pipelines.files.plain_content import content_of
from ..config import ConfigError, broken_character
from .files import CAPTION_SUFFIX, METADATA, some

logger = logging.getLogger(__name__)

_NAME, _TEXT = "file_name", "text"


def read_captions(folder: Path, files: Sequence[Path], missing: str = "error") -> dict[Path, str]:
    """The caption of each file that has one.

    `metadata.jsonl` or else `metadata.csv` at the top of the folder has `file_name` and `text`. A file that it does not
    name has its caption in the text file of the same name beside it, all of it.

    Args:
        folder: with the metadata; file names are relative to it, or absolute.
        files: those that are there.
        missing: "error", or "skip" files without a caption, which may be all.

    Raises:
        ConfigError: a file that is not in UTF-8, a line that cannot be read or says what another denies, or missing
            captions. The message has the number of the line.
    """
    tables = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(tables) > 1:
        logger.warning("%s is not read: %s is there too, and counts.", tables[1], tables[0].name)
    rows = list(_rows(tables[0], missing)) if tables else []
    listed = _listed(rows, _Names(folder, files), tables[0]) if tables else {}
    beside = _beside(folder, files)
    if not tables and not beside:
        what = (
            f"{folder} has no captions: write a metadata.jsonl or metadata.csv with {_NAME} and {_TEXT}, or a "
            f"{CAPTION_SUFFIX} file beside each of the files, with the same name."
        )
        return _none_at_all(what, missing)
    both = [path.name for path, text in listed.items() if beside.get(path, text) != text]
    if both:
        logger.warning(
            "%d files have another caption in their %s file, which is not read: %s",
            len(both), CAPTION_SUFFIX, some(both),
        )  # fmt: skip
    captions = {path: listed.get(path) or beside.get(path) for path in files}
    without = [path.relative_to(folder).as_posix() for path, text in captions.items() if not text]
    source = tables[0] if tables else folder
    if len(without) == len(files):
        names = [row.name for row in rows]
        named = f" It names {some(names)}; there are {some(without)}." if names else ""
        return _none_at_all(f"{source}: no file in {folder} has a caption.{named}", missing)
    if without and missing == "error":
        raise ConfigError(
            f"{source}: {len(without)} of {len(files)} files have no caption ({some(without)}): write them, or set "
            "data.missing_captions to skip."
        )
    if without:
        logger.warning("%d files have no caption and are left out: %s", len(without), some(without))
    return {path: text for path, text in captions.items() if text}


def _none_at_all(what: str, missing: str) -> dict[Path, str]:
    """No captions: a fault, or of one folder that is left out."""
    if missing == "error":
        raise ConfigError(what)
    logger.warning("%s It is left out.", what)
    return {}


@dataclass(frozen=True)
class _Row:
    """A line of the metadata: its number, the name in it, and the caption, "" for none."""

    line: int
    name: str
    text: str


def _listed(rows: Sequence[_Row], names: _Names, table: Path) -> dict[Path, str]:
    """The captions that the metadata has, of files that are there."""
    found: dict[Path, _Row] = {}
    absent, again = [], []
    for row in rows:
        path = names.find(row.name, f"{table}, line {row.line}")
        if path is None:
            absent.append(row.name)
            continue
        before = found.setdefault(path, row)
        if before is not row:
            if before.text != row.text:
                raise ConfigError(
                    f"{table}, line {row.line}: {row.name} has another caption than in line {before.line}: keep one."
                )
            again.append(row.name)
    if absent:
        logger.warning("%s names %d files that are not there: %s", table, len(absent), some(absent))
    if again:
        logger.warning("%s has %d lines twice: %s", table, len(again), some(again))
    return {path: row.text for path, row in found.items() if row.text}


class _Names:
    """Files by the names that people write: `./a.mp4`, `sub\\a.mp4`, absolute, composed or not, in another case, or by
    a link."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.folder, self.files = folder, files
        self.exact: dict[str, list[Path]] = {}
        self.alike: dict[str, list[Path]] = {}
        for path in files:
            name = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())
            self.exact.setdefault(name, []).append(path)
            self.alike.setdefault(name.casefold(), []).append(path)

    def find(self, name: str, place: str) -> Path | None:
        """The file that is meant, or None.

        Raises:
            ConfigError: it could be several.
        """
        for written in dict.fromkeys((name, name.replace("\\", "/"))):
            relative = self._relative(written)
            meant = self.exact.get(relative) or self._linked(written) or self.alike.get(relative.casefold(), [])
            if len(meant) > 1:
                raise ConfigError(f"{place}: {name} could be {some([path.name for path in meant])}: rename one.")
            if meant:
                return meant[0]
        return None

    def _linked(self, name: str) -> list[Path]:
        """The file to which a name leads through links: of its names, the files have one."""
        path = self._real.get(os.path.realpath(self.folder / name))
        return [path] if path is not None else []

    @cached_property
    def _real(self) -> dict[str, Path]:
        return {os.path.realpath(path): path for path in self.files}

    def _relative(self, name: str) -> str:
        path = os.path.normpath(name)
        if os.path.isabs(path):
            for top in (os.path.abspath(self.folder), os.path.realpath(self.folder)):
                if path.startswith(top + os.sep):
                    path = os.path.relpath(path, top)
                    break
        return unicodedata.normalize("NFC", Path(path).as_posix())


def _beside(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """The captions in text files beside the files; text files of no file are named in the log."""
    texts: dict[tuple[Path, str], Path] = {}
    for parent in dict.fromkeys([folder, *(path.parent for path in files)]):
        for path in sorted(parent.iterdir()):
            if path.suffix.lower() == CAPTION_SUFFIX and not path.name.startswith(".") and path.is_file():
                texts.setdefault((parent, unicodedata.normalize("NFC", path.stem)), path)
    found, used = {}, set()
    for path in files:
        text = texts.get((path.parent, unicodedata.normalize("NFC", path.stem)))
        if text is not None:
            found[path] = _decoded(text).strip()
            used.add(text)
    idle = [path.relative_to(folder).as_posix() for path in texts.values() if path not in used]
    if idle:
        logger.warning("%s: no file belongs to %s, which is not read.", folder, some(idle))
    return found


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not in UTF-8 ({error}): save it in UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _rows(table: Path, missing: str) -> Iterator[_Row]:
    """The lines of the metadata.

    Raises:
        ConfigError: one that cannot be read, or that lacks a name, or a caption where none may be missing.
    """
    read = _csv_rows if table.suffix == ".csv" else _json_rows
    for line, row in read(table):
        place = f"{table}, line {line}"
        for key in (_NAME, _TEXT):
            if key not in row and (key == _NAME or missing == "error"):
                raise ConfigError(f"{place}: there is no {key} in it; found: {', '.join(row) or 'nothing'}.")
        name, text = row[_NAME], row.get(_TEXT)
        if not isinstance(name, str) or not name.strip() or not _names_a_file(name):
            raise ConfigError(f"{place}: there is no {_NAME} in it: {name!r} is no name.")
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"{place}: {_TEXT} of {name} is {text!r}, but must be text.")
        broken = broken_character(text or "")
        if broken is not None:
            raise ConfigError(f"{place}: {_TEXT} of {name} {broken}")
        yield _Row(line, name.strip(), (text or "").strip())


def _names_a_file(name: str) -> bool:
    """Whether a file can have this name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Strict: a quotation mark that is never closed would swallow the lines behind it.
    reader = csv.reader(io.StringIO(_decoded(table)), strict=True)
    try:
        header: list[str] | None = None
        start = 1
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(cells, f"{table}, line {line}")
                continue
            if len(cells) > len(header):
                raise ConfigError(
                    f"{table}, line {line}: it has {len(cells)} columns ({some(cells)}), and the header has "
                    f'{len(header)}: put a caption with commas into quotation marks: a.mp4,"one, two".'
                )
            yield line, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        if "field larger than" in str(error):  # csv has no class of its own for it
            longest = f"a caption has more than {csv.field_size_limit():,} characters"
            raise ConfigError(
                f"{table}, line {start}: {longest}: shorten it, close a quotation mark that is left open, or use "
                "metadata.jsonl, which has no such bound."
            ) from error
        raise ConfigError(
            f"{table}, line {start}: no CSV: {error}. A quotation mark inside a caption is written twice, and the "
            "caption in quotation marks."
        ) from error


def _header(cells: Sequence[str], place: str) -> list[str]:
    names = [cell.strip().casefold() for cell in cells]
    for key in (_NAME, _TEXT):
        if names.count(key) != 1:
            raise ConfigError(
                f"{place}: the first line must be the header, with {_NAME} and {_TEXT} once each, separated by commas; "
                f"found: {', '.join(cells)}."
            )
    return names


def _json_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(_decoded(table)), start=1):
        if not line.strip():
            continue
        try:
            row = content_of(line, True)
        except ValueError as error:
            raise ConfigError(f"{table}, line {number}: no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ConfigError(f'{table}, line {number}: must be an object with "{_NAME}" and "{_TEXT}".')
        yield number, row
