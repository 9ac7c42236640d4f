"""Folders of videos or images with captions, as clips."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...generation.media.files import Cut, Media
from ..config import ConfigError
from ..distributed.processes import Process
from ..settings import DataSettings, FolderSettings, SizeSettings
from .ahead import ahead, readers
from .captions import read_captions
from .decode import DECODER_VERSION, kind_of, read_clip, suffixes_of
from .files import media_files, some
from .media_index import content, look_into
from .sampler import Pick, fitting_sizes, nearest_size

logger = logging.getLogger(__name__)

_PARTS = 2**20
"""An index is the file's number times this, plus the number of the clip in it."""

MOST_ENLARGED, LEAST_KEPT, MOST_OFF_RATE = 1.25, 0.6, 0.05
"""What is said of files by name: that they are enlarged more often than that, keep less than this share of their
picture, or differ by more than this share from the model's frame rate (which data.fps may, too)."""


@dataclass(frozen=True)
class Fit:
    """How a picture becomes one of another size: enlarged by a factor to cover it, of which a share is kept."""

    factor: float
    kept: float

    @property
    def keeps_it(self) -> bool:
        return self.factor <= MOST_ENLARGED and self.kept >= LEAST_KEPT


@dataclass(frozen=True)
class Entry:
    """One file, its caption, how often its clips come in a round, the hash of its content where that is known, and the
    number of its folder.
    """

    path: Path
    caption: str
    media: Media
    content: str | None = None
    repeats: int = 1
    folder: int = 0


class MediaFolder:
    """A `ClipDataset`: clips of the files of folders, cut from the middle of the picture, or anywhere if random.

    A video gives as many clips, one behind the other, as it has frames for. `tells`: whether it says which
    are left out.
    """

    def __init__(self, entries: Sequence[Entry], data: DataSettings, random_crops: bool, tells: bool = True) -> None:
        self.entries, self.data, self.random_crops = tuple(entries), data, random_crops
        self._tells = tells
        self._contents: dict[int, str] = {}
        self._told: set[str] = set()

    @classmethod
    def open(
        cls,
        data: DataSettings,
        random_crops: bool = False,
        need_captions: bool = True,
        process: Process | None = None,
    ) -> MediaFolder:
        """Read the captions and look into every file; `process` shows how far it is.

        Raises:
            ConfigError: no such folder, nothing in it, no or incomplete captions, or no file that can be decoded; or
                what the cache remembers of them cannot be read.
            CheckpointError: it cannot be written there.
        """
        captions: dict[Path, tuple[str, int, int]] = {}
        # A file has many names: through links, relative or absolute. Once as two, it could be trained on and measured.
        seen: set[Path] = set()
        again = []
        for number, (name, folder) in enumerate(_folders(data)):
            for path, text in _captioned(name, folder, data, need_captions).items():
                real = path.resolve()
                if real in seen:
                    again.append(str(path))
                else:
                    captions[path] = (text, folder.repeats, number)
                    seen.add(real)
        if not captions:
            raise ConfigError(f"{data.source}: no file in {_named(data)} has a caption; the log above says more.")
        if again:
            logger.warning(
                "%d files are in several of data.folders and count for the first: %s", len(again), some(again)
            )
        # Clips cut at random are not cached, so no one asks what they follow from.
        known = look_into(list(captions), data.kind, data.cache, not random_crops, process)
        entries = [
            Entry(path, text, known[path].media, known[path].content, repeats, number)
            for path, (text, repeats, number) in captions.items()
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
        return cls(entries, data, random_crops, tells=process is None or process.is_main)

    def members(self, sizes: Sequence[SizeSettings]) -> Mapping[int, Sequence[int]]:
        found: dict[int, list[int]] = {number: [] for number in range(len(sizes))}
        short, longest = [], 0
        least = min(self._lengths_of_videos(sizes), default=0)
        for number, entry in enumerate(self.entries):
            frames = self._frames(entry)
            chosen = self._sizes_of(entry, sizes)
            if not chosen and frames < least and kind_of(entry.path, self.data.kind) == "videos":
                short.append(f"{entry.path.name} ({frames})")
                longest = max(longest, frames)
            for size in chosen:
                clips = frames // sizes[size].frames
                if self.random_crops:
                    clips = 1  # the start is random
                parts = range(min(clips, self.data.clips or clips))
                found[size] += [number * _PARTS + part for part in parts] * entry.repeats
        rate = f" at data.fps = {self.data.fps:g}" if self.data.fps else ""
        if short:
            self._warn_once(
                f"{len(short)} videos have less than {least} frames{rate} and are left out: {some(short)}; the longest "
                f"has {longest}: a size of so many frames, or fewer, takes it."
            )
        if not any(found.values()):
            raise ConfigError(
                f"{self.data.source}: no video in {_named(self.data)} has the {least} frames of the shortest of the "
                f"sizes: the longest has {longest}{rate}: give longer videos, or smaller `frames`."
            )
        return found

    def _lengths_of_videos(self, sizes: Sequence[SizeSettings]) -> list[int]:
        """Frames of the sizes that videos go to; where there are images, too, these have the sizes of 1 frame."""
        return [size.frames for size in sizes if self.data.kind != "mixed" or size.frames > 1]

    def _frames(self, entry: Entry) -> int:
        return 1 if kind_of(entry.path, self.data.kind) == "images" else entry.media.frames_at(self.data.fps)

    def _sizes_of(self, entry: Entry, sizes: Sequence[SizeSettings]) -> list[int]:
        """Numbers of the sizes that a file gives clips in."""
        media, frames = entry.media, self._frames(entry)
        single = kind_of(entry.path, self.data.kind) == "images" if self.data.kind == "mixed" else None
        best = nearest_size(sizes, media.height, media.width, frames, single)
        if best is None:
            return []
        if self.data.sizes_per_video == "best":
            return [best]
        possible = fitting_sizes(sizes, frames, single)
        return [n for n in possible if n == best or _fit(media, sizes[n]).keeps_it]

    def _warn_once(self, text: str) -> None:
        """The sizes are gone through several times in a run, and in each of its processes."""
        if self._tells and text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)

    def folder(self, index: int) -> int:
        return self.entries[index // _PARTS].folder

    def cautions(self, sizes: Sequence[SizeSettings], rate: float | None) -> list[str]:
        enlarged, cut = [], []
        for entry in self.entries:
            cuts = [(_fit(entry.media, sizes[number]), sizes[number]) for number in self._sizes_of(entry, sizes)]
            worst = max(cuts, key=lambda each: each[0].factor, default=None)
            if worst is not None and worst[0].factor > MOST_ENLARGED:
                enlarged.append(f"{_described(entry, worst[1])}, {worst[0].factor:.2g} times")
            worst = min(cuts, key=lambda each: each[0].kept, default=None)
            if worst is not None and worst[0].kept < LEAST_KEPT:
                cut.append(f"{_described(entry, worst[1])}, {worst[0].kept:.0%}")
        told = []
        if enlarged:
            told.append(
                f"{len(enlarged)} {self.data.files} are enlarged more than {MOST_ENLARGED:g} times, and the model "
                f"learns how blurred that makes them: leave them out, or give a smaller size: {some(enlarged)}"
            )
        if cut:
            told.append(
                f"{len(cut)} {self.data.files} keep less than {LEAST_KEPT:.0%} of their picture: give a size in "
                f"data.sizes that has their shape, or leave them out: {some(cut)}"
            )
        videos = [entry for entry in self.entries if self._frames(entry) > 1]
        if rate is not None and self.data.fps is None:
            other = [entry for entry in videos if abs(float(entry.media.fps) / rate - 1) > MOST_OFF_RATE]
            if other:
                named = some([f"{entry.path.name} ({float(entry.media.fps):.4g})" for entry in other])
                told.append(
                    f"{len(other)} videos do not have the {rate:g} frames a second of the model, and every frame is "
                    f"taken, so that motion is learned slower or faster than it is: set data.fps to {rate:g}: {named}"
                )
        elif rate is not None and videos and abs(self.data.fps / rate - 1) > MOST_OFF_RATE:
            learned = "faster" if self.data.fps < rate else "slower"
            told.append(
                f"data.fps is {self.data.fps:g}, and the model makes {rate:g} frames a second, so that motion is "
                f"learned {learned} than it is: set data.fps to {rate:g}"
            )
        return told

    def identity(self, pick: Pick) -> str:
        number, part = divmod(pick.index, _PARTS)
        entry = self.entries[number]
        if number not in self._contents:
            self._contents[number] = entry.content or content(entry.path)
        return (
            f"file {self._contents[number]}, clip {part}, fps {self.data.fps}, size {list(pick.size)}, "
            f"{kind_of(entry.path, self.data.kind)} {DECODER_VERSION}"
        )

    def identify(self, process: Process) -> None:
        numbers = [n for n, entry in enumerate(self.entries) if entry.content is None and n not in self._contents]
        read = ahead(lambda number: content(self.entries[number].path), numbers, readers(), 64)
        for number, found in zip(numbers, process.track(read, "reading files whole", len(numbers)), strict=True):
            self._contents[number] = found

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


def _fit(media: Media, size: SizeSettings) -> Fit:
    factor = max(size.height / media.height, size.width / media.width)
    return Fit(factor, size.height * size.width / (media.height * media.width * factor**2))


def _described(entry: Entry, size: SizeSettings) -> str:
    return f"{entry.path.name} ({entry.media.height}x{entry.media.width}) at {size.height}x{size.width}"


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
