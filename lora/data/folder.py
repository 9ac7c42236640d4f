"""Folders of videos or images with captions in `metadata.jsonl` or `metadata.csv`."""

from __future__ import annotations

import csv
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import ConfigError
from ..settings import DataSettings, SizeSettings
from .decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Cut, Media, check_decoder, read_clip
from .media_index import Known, content, look_into
from .sampler import Pick, nearest_size

logger = logging.getLogger(__name__)

_PARTS = 2**20
"""An index is the file's number times this, plus the number of the clip in it."""


@dataclass(frozen=True)
class Entry:
    """One file, its caption, and the hash of its content where that is known."""

    path: Path
    caption: str
    media: Media
    content: str | None = None


class MediaFolder:
    """A `ClipDataset`: clips of the files of a folder, cut from the middle of the picture, or anywhere if random.

    A video gives as many clips, one behind the other, as it has frames for.
    """

    def __init__(self, entries: Sequence[Entry], data: DataSettings, random_crops: bool) -> None:
        self.entries, self.data, self.random_crops = tuple(entries), data, random_crops
        self._contents: dict[int, str] = {}

    @classmethod
    def open(cls, data: DataSettings, random_crops: bool = False, need_captions: bool = True) -> MediaFolder:
        """Read the captions and look into every file.

        Raises:
            ConfigError: no such folder, nothing in it, no or incomplete captions, or no file that can be decoded.
        """
        refusal = check_decoder(data.decoder)
        if refusal:
            raise ConfigError(refusal)
        folder = Path(data.folder).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"data.folder: {folder} is no folder.")
        suffixes = IMAGE_SUFFIXES if data.kind == "images" else VIDEO_SUFFIXES
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
        if not files:
            raise ConfigError(f"data.folder: {folder} holds no {data.kind} ({', '.join(suffixes)}).")
        captions = read_captions(folder, files, data.missing_captions) if need_captions else dict.fromkeys(files, "")
        # Clips cut at random are not cached, so no one asks what they follow from.
        known: dict[Path, Known] = look_into(list(captions), data.cache, contents=not random_crops)
        entries = [Entry(p, text, known[p].media, known[p].content) for p, text in captions.items() if p in known]
        lost = len(captions) - len(entries)
        if lost:
            logger.warning(
                "%d of %d %s in %s cannot be decoded and are left out.", lost, len(captions), data.kind, folder.name
            )
        if not entries:
            raise ConfigError(f"data.folder: none of the {len(captions)} {data.kind} in {folder} can be decoded.")
        return cls(entries, data, random_crops)

    def members(self, sizes: Sequence[SizeSettings]) -> Mapping[int, Sequence[int]]:
        found: dict[int, list[int]] = {number: [] for number in range(len(sizes))}
        short = []
        for number, entry in enumerate(self.entries):
            frames = self._frames(entry)
            size = nearest_size(sizes, entry.media.height, entry.media.width, frames)
            if size is None:
                short.append(entry.path.name)
                continue
            clips = frames // sizes[size].frames
            if self.random_crops:
                clips = 1  # the start is random
            found[size] += [number * _PARTS + part for part in range(min(clips, self.data.clips or clips))]
        if short:
            least = min(size.frames for size in sizes)
            logger.warning("%d videos have less than %d frames and are left out: %s", len(short), least, _some(short))
        if not any(found.values()):
            raise ConfigError(
                f"data.folder: no video in {self.data.folder} has the {min(s.frames for s in sizes)} frames of the "
                "shortest of the sizes: give longer videos, or smaller `frames`."
            )
        return found

    def identity(self, pick: Pick) -> str:
        number, part = divmod(pick.index, _PARTS)
        entry = self.entries[number]
        if number not in self._contents:
            self._contents[number] = entry.content or content(entry.path)
        decoder = "" if self.data.decoder == "imageio" else f", decoder {self.data.decoder}"
        # 2: images are turned as their EXIF says.
        version = 2 if self.data.kind == "images" else 1
        return (
            f"file {self._contents[number]}, clip {part}, fps {self.data.fps}, size {list(pick.size)}, "
            f"middle {version}{decoder}"
        )

    def caption(self, index: int) -> str:
        return self.entries[index // _PARTS].caption

    def captions(self) -> Sequence[str]:
        return list(dict.fromkeys(entry.caption for entry in self.entries))

    def group(self, index: int) -> int:
        return index // _PARTS

    def pixels(self, pick: Pick) -> torch.Tensor:
        number, part = divmod(pick.index, _PARTS)
        entry = self.entries[number]
        return read_clip(entry.path, entry.media, self._cut(entry, part, pick), self.data.decoder)

    def _cut(self, entry: Entry, part: int, pick: Pick) -> Cut:
        frames, height, width = pick.size
        if not self.random_crops:
            return Cut(part * frames, frames, self.data.fps, height, width)
        rng = random.Random(pick.place.seed)
        native = 1 / max(height / entry.media.height, width / entry.media.width)
        return Cut(
            rng.randint(0, max(0, self._frames(entry) - frames)),
            frames,
            self.data.fps,
            height,
            width,
            enlarge=rng.uniform(1.0, max(1.0, native)),
            top=rng.random(),
            left=rng.random(),
        )

    def _frames(self, entry: Entry) -> int:
        """Frames of a file at the frame rate of the clips."""
        if self.data.fps is None or entry.media.frames == 1:
            return entry.media.frames
        return int(entry.media.frames / entry.media.fps * self.data.fps)


def read_captions(folder: Path, files: Sequence[Path], missing: str = "error") -> dict[Path, str]:
    """The caption of each file, from `metadata.jsonl` or `metadata.csv` with `file_name` and `text`.

    Args:
        folder: with the metadata; file names are relative to it.
        files: those that are there.
        missing: "error", or "skip" files without a caption.

    Raises:
        ConfigError: no metadata, one that is not in UTF-8, a line that cannot be read, or missing captions.
    """
    found = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
    if not found:
        raise ConfigError(f"{folder} has no metadata.jsonl or metadata.csv: write one, with file_name and text.")
    known = {path.relative_to(folder).as_posix(): path for path in files}
    captions: dict[Path, str] = {}
    bare, absent = [], []
    for place, row in _readable(found[0]):
        name, text = row.get("file_name"), row.get("text")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{found[0]}, {place}: there is no file_name in it.")
        if name not in known:
            absent.append(name)
        elif not isinstance(text, str) or not text.strip():
            bare.append(name)
        else:
            captions[known[name]] = text.strip()
    without = [*bare, *(name for name, path in known.items() if path not in captions and name not in bare)]
    if absent:
        logger.warning("%s names %d files that are not there: %s", found[0], len(absent), _some(absent))
    if without and missing == "error":
        raise ConfigError(
            f"{found[0]}: {len(without)} of {len(known)} files have no caption ({_some(without)}): write them, or set "
            "data.missing_captions to skip."
        )
    if without:
        logger.warning("%d files have no caption and are left out: %s", len(without), _some(without))
    if not captions:
        raise ConfigError(f"{found[0]}: no file in {folder} has a caption.")
    return captions


def _readable(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        yield from _rows(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not in UTF-8 ({error}): save it in UTF-8.") from error
    except csv.Error as error:
        raise ConfigError(f"{path} is no CSV: {error}") from error


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            for number, row in enumerate(csv.DictReader(file), start=2):
                yield f"line {number}", row
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f'{path}, line {number}: must be an object with "file_name" and "text".')
            yield f"line {number}", row


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
