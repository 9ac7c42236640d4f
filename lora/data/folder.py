"""Folders of videos or images with captions, as clips."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...generation.media import Cut, Media
from ..config import ConfigError
from ..settings import DataSettings, FolderSettings, SizeSettings
from .captions import read_captions
from .decode import DECODER_VERSION, kind_of, read_clip, suffixes_of
from .files import media_files, some
from .media_index import content, look_into
from .sampler import Pick, nearest_size

logger = logging.getLogger(__name__)

_PARTS = 2**20
"""An index is the file's number times this, plus the number of the clip in it."""


@dataclass(frozen=True)
class Entry:
    """One file, its caption, how often its clips come in a round, and the hash of its content where that is known."""

    path: Path
    caption: str
    media: Media
    content: str | None = None
    repeats: int = 1


class MediaFolder:
    """A `ClipDataset`: clips of the files of folders, cut from the middle of the picture, or anywhere if random.

    A video gives as many clips, one behind the other, as it has frames for.
    """

    def __init__(self, entries: Sequence[Entry], data: DataSettings, random_crops: bool) -> None:
        self.entries, self.data, self.random_crops = tuple(entries), data, random_crops
        self._contents: dict[int, str] = {}

    @classmethod
    def open(cls, data: DataSettings, random_crops: bool = False, need_captions: bool = True) -> MediaFolder:
        """Read the captions and look into every file.

        Raises:
            ConfigError: no such folder, nothing in it, no or incomplete captions, or no file that can be decoded; or
                what the cache remembers of them cannot be read.
            CheckpointError: it cannot be written there.
        """
        captions: dict[Path, tuple[str, int]] = {}
        # A file has many names: through links, relative or absolute. Once as two, it could be trained on and measured.
        seen: set[Path] = set()
        again = []
        for name, folder in _folders(data):
            for path, text in _captioned(name, folder, data, need_captions).items():
                real = path.resolve()
                if real in seen:
                    again.append(str(path))
                else:
                    captions[path] = (text, folder.repeats)
                    seen.add(real)
        if not captions:
            raise ConfigError(f"{data.source}: no file in {_named(data)} has a caption; the log above says more.")
        if again:
            logger.warning(
                "%d files are in several of data.folders and count for the first: %s", len(again), some(again)
            )
        # Clips cut at random are not cached, so no one asks what they follow from.
        known = look_into(list(captions), data.kind, data.cache, contents=not random_crops)
        entries = [
            Entry(path, text, known[path].media, known[path].content, repeats)
            for path, (text, repeats) in captions.items()
            if path in known
        ]
        names = _named(data)
        lost = len(captions) - len(entries)
        if lost:
            logger.warning(
                "%d of %d %s in %s cannot be decoded and are left out.", lost, len(captions), data.files, names
            )
        if not entries:
            raise ConfigError(f"{data.source}: none of the {len(captions)} {data.files} in {names} can be decoded.")
        kinds = {kind_of(entry.path, data.kind) for entry in entries}
        if data.kind == "mixed" and len(kinds) == 1:
            raise ConfigError(f"data.kind is mixed, and {names} has {min(kinds)} alone: set it to {min(kinds)}.")
        _say_what_is_special(entries, data.fps)
        return cls(entries, data, random_crops)

    def members(self, sizes: Sequence[SizeSettings]) -> Mapping[int, Sequence[int]]:
        found: dict[int, list[int]] = {number: [] for number in range(len(sizes))}
        short = []
        for number, entry in enumerate(self.entries):
            image = kind_of(entry.path, self.data.kind) == "images"
            frames = 1 if image else entry.media.frames_at(self.data.fps)
            single = image if self.data.kind == "mixed" else None
            size = nearest_size(sizes, entry.media.height, entry.media.width, frames, single)
            if size is None:
                short.append(f"{entry.path.name} ({frames})")
                continue
            clips = frames // sizes[size].frames
            if self.random_crops:
                clips = 1  # the start is random
            parts = range(min(clips, self.data.clips or clips))
            found[size] += [number * _PARTS + part for part in parts] * entry.repeats
        if short:
            least = min(size.frames for size in sizes)
            logger.warning("%d videos have less than %d frames and are left out: %s", len(short), least, some(short))
        if not any(found.values()):
            least = min(size.frames for size in sizes)
            raise ConfigError(
                f"{self.data.source}: no video in {_named(self.data)} has the {least} frames of the shortest of the "
                "sizes: give longer videos, or smaller `frames`."
            )
        return found

    def identity(self, pick: Pick) -> str:
        number, part = divmod(pick.index, _PARTS)
        entry = self.entries[number]
        if number not in self._contents:
            self._contents[number] = entry.content or content(entry.path)
        return (
            f"file {self._contents[number]}, clip {part}, fps {self.data.fps}, size {list(pick.size)}, "
            f"{kind_of(entry.path, self.data.kind)} {DECODER_VERSION}"
        )

    def caption(self, index: int) -> str:
        return self.entries[index // _PARTS].caption

    def outline(self, index: int) -> str:
        entry = self.entries[index // _PARTS]
        media, size = entry.media, entry.path.stat().st_size
        return f"{size} bytes, {media.height}x{media.width}, {media.frames} frames in {media.seconds} s"

    def captions(self) -> Sequence[str]:
        return list(dict.fromkeys(entry.caption for entry in self.entries))

    def group(self, index: int) -> int:
        return index // _PARTS

    def pixels(self, pick: Pick) -> torch.Tensor:
        number, part = divmod(pick.index, _PARTS)
        entry = self.entries[number]
        kind = kind_of(entry.path, self.data.kind)
        return read_clip(entry.path, entry.media, self._cut(entry, part, pick), kind)

    def _cut(self, entry: Entry, part: int, pick: Pick) -> Cut:
        frames, height, width = pick.size
        if not self.random_crops:
            return Cut(part * frames, frames, self.data.fps, height, width)
        rng = random.Random(pick.place.seed)
        native = 1 / max(height / entry.media.height, width / entry.media.width)
        return Cut(
            rng.randint(0, max(0, entry.media.frames_at(self.data.fps) - frames)),
            frames,
            self.data.fps,
            height,
            width,
            enlarge=rng.uniform(1.0, max(1.0, native)),
            top=rng.random(),
            left=rng.random(),
        )


def _folders(data: DataSettings) -> list[tuple[str, FolderSettings]]:
    """The folders, each with the name of its setting."""
    if data.folders:
        return [(f"data.folders.{number}", folder) for number, folder in enumerate(data.folders)]
    return [("data.folder", FolderSettings(data.folder))]


def _named(data: DataSettings) -> str:
    return ", ".join(folder.path for _, folder in _folders(data))


def _captioned(name: str, settings: FolderSettings, data: DataSettings, need_captions: bool) -> dict[Path, str]:
    """The files of one folder that are trained on, with their captions.

    Args:
        name: of the setting of the folder.
        settings: of the folder.
        data: all settings of the data.
        need_captions: whether they have any.
    """
    folder = Path(settings.path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{name}: {folder} is no folder.")
    suffixes = suffixes_of(data.kind)
    files = media_files(folder, suffixes, data.files)
    if not files:
        raise ConfigError(f"{name}: {folder} holds no {data.files} ({', '.join(suffixes)}).")
    return read_captions(folder, files, data.missing_captions) if need_captions else dict.fromkeys(files, "")


def _say_what_is_special(entries: Sequence[Entry], fps: float | None) -> None:
    """Name the videos that are not trained on as they are."""
    variable = [entry.path.name for entry in entries if entry.media.variable]
    if variable:
        done = (
            "every frame is taken, however long it is shown: set data.fps to sample them evenly"
            if fps is None
            else f"they are sampled at {fps:g} frames per second, by the time at which each frame is shown"
        )
        logger.warning("%d videos have a variable frame rate (%s); %s.", len(variable), some(variable), done)
    slow = [entry.path.name for entry in entries if fps and entry.media.frames > 1 and entry.media.fps < fps * 0.99]
    if slow:
        logger.warning(
            "%d videos have less than data.fps = %g frames per second, so some of their frames come twice: %s",
            len(slow), fps, some(slow),
        )  # fmt: skip
    woven = [entry.path.name for entry in entries if entry.media.interlaced]
    if woven:
        logger.warning(
            "%d videos are interlaced and are taken as they are, with combs where something moves: %s",
            len(woven), some(woven),
        )  # fmt: skip
    hdr = [entry.path.name for entry in entries if entry.media.hdr]
    if hdr:
        logger.warning("%d videos are HDR and are taken in the range of others (BT.709): %s", len(hdr), some(hdr))
