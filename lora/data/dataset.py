"""Clips by index: what every kind of data offers, and the choice among them."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from ...pipelines.quiet_logs import only_logs
from ..distributed.processes import Process
from ..settings import DataSettings, SizeSettings
from .cache import check_cache
from .sampler import Pick

logger = logging.getLogger(__name__)


class ClipDataset(Protocol):
    """Captioned clips. It is copied to background processes, so it holds no open files."""

    def members(self, sizes: Sequence[SizeSettings]) -> Mapping[int, Sequence[int]] | None:
        """Indices of the clips by number of the size; None for endless clips, whose indices are seeds."""
        ...

    def identity(self, pick: Pick) -> str:
        """What the pixels of a clip follow from: equal for equal pixels."""
        ...

    def identify(self, process: Process) -> None:
        """Read what `identity` follows from, several files at a time, where it asks for all clips.

        Raises:
            OSError: a file cannot be read any more.
        """
        ...

    def outline(self, index: int) -> str:
        """What is known of the file of a clip that was looked into but not read whole; another file hardly has it."""
        ...

    def caption(self, index: int) -> str:
        """The caption of a clip, without decoding it."""
        ...

    def captions(self) -> Sequence[str]:
        """Every caption that can occur, each once."""
        ...

    def group(self, index: int) -> int:
        """The file of a clip. Clips of one file are too much alike to train on some and measure with others."""
        ...

    def folder(self, index: int) -> int:
        """The folder of a clip, by its number among those that the settings name."""
        ...

    def cautions(self, sizes: Sequence[SizeSettings], rate: float | None) -> Sequence[str]:
        """What becomes of files that one may not expect, with their names: one sentence each.

        Args:
            sizes: of the clips.
            rate: frames a second of the videos that the model makes; None for unknown.
        """
        ...

    def pixels(self, pick: Pick) -> torch.Tensor:
        """A clip `[3, T, H, W]` in [-1, 1].

        Raises:
            OSError: the file is damaged; the message names it.
        """
        ...


def sturdy_pixels(
    dataset: ClipDataset,
    pick: Pick,
    members: Mapping[int, Sequence[int]] | None,
    sizes: Sequence[SizeSettings],
    tries: int = 8,
) -> tuple[torch.Tensor, int]:
    """The pixels of a clip and its index; of another clip of its size where its file turns out to be damaged.

    Raises:
        OSError: so were `tries` others.
    """
    rng = random.Random(pick.place.seed)
    for attempt in range(tries + 1):
        try:
            return dataset.pixels(pick), pick.index
        except OSError as error:
            if members is None or attempt == tries:
                raise
            logger.warning("%s; another clip takes its place.", error)
            same = [n for n in members if (sizes[n].frames, sizes[n].height, sizes[n].width) == pick.size]
            pick = replace(pick, index=rng.choice([index for n in same for index in members[n]]))
    raise AssertionError("unreachable")


def open_dataset(
    data: DataSettings,
    seed: int,
    random_crops: bool = False,
    need_captions: bool = True,
    process: Process | None = None,
) -> ClipDataset:
    """The dataset that the settings describe.

    Args:
        data: the settings.
        seed: of the scenes of the demo world.
        random_crops: cut a random part of a video instead of its middle; the pixels then depend on the step.
        need_captions: whether files without captions are a fault.
        process: of a run of several, in each of which this is called. With a cache the main one looks into the files,
            and the others read there what it found.

    Raises:
        ConfigError: a folder that is missing, empty or without captions; or a cache that is no folder.
    """
    check_cache(data.cache)
    if data.kind == "demo":
        from .demo import DemoScenes

        return DemoScenes(data.clips, data.zoom, seed)
    from .folder import MediaFolder

    def opened() -> ClipDataset:
        with _told_once(process):
            return MediaFolder.open(data, random_crops, need_captions, process)

    return opened() if process is None or not data.cache else process.main_first(opened)


@contextlib.contextmanager
def _told_once(process: Process | None) -> Iterator[None]:
    """Every process looks at the same files; what is to be said of them, the main one says."""
    with contextlib.ExitStack() as stack:
        if process is not None and not process.is_main:
            for part in ("captions", "files", "folder", "media_index"):
                stack.enter_context(only_logs(f"{__package__}.{part}", lambda message: False))
        yield
