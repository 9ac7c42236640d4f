"""The procedural demo world as a data set."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ...demo import world
from ..distributed.generators import derive_seed
from ..distributed.processes import Process
from ..settings import SizeSettings
from .sampler import Pick

CLIP_FRAMES = 32
"""Frames in which an object of the demo world covers its whole way; shorter clips are a part of it."""


class DemoScenes:
    """A `ClipDataset`: rendered clips of the demo world; held-out captions never occur.

    Args:
        clips: how many scenes there are; None for endless new ones.
        zoom: each scene is enlarged by one of these factors, and then may be cut by the edge.
        seed: of the scenes of a finite set.
    """

    def __init__(self, clips: int | None = None, zoom: tuple[float, ...] = (1.0,), seed: int = 0) -> None:
        self.clips, self.zoom, self.seed = clips, zoom, seed

    def members(self, sizes: Sequence[SizeSettings]) -> Mapping[int, Sequence[int]] | None:
        return None if self.clips is None else {number: range(self.clips) for number in range(len(sizes))}

    def identity(self, pick: Pick) -> str:
        return f"demo world 1, seed {self._seed(pick.index)}, zoom {list(self.zoom)}, size {list(pick.size)}"

    def identify(self, process: Process) -> None:
        """Everything is known."""

    def outline(self, index: int) -> str:
        return f"demo world 1, seed {self._seed(index)}"

    def caption(self, index: int) -> str:
        return world.sample_scene(random.Random(self._seed(index))).caption

    def captions(self) -> Sequence[str]:
        if self.clips is None:
            return world.training_captions()
        return sorted({self.caption(index) for index in range(self.clips)})

    def group(self, index: int) -> int:
        return index

    def folder(self, index: int) -> int:
        return 0

    def cautions(self, sizes: Sequence[SizeSettings], rate: float | None) -> Sequence[str]:
        return []

    def pixels(self, pick: Pick) -> torch.Tensor:
        rng = random.Random(self._seed(pick.index))
        scene = world.sample_scene(rng)
        frames, height, width = pick.size
        zoom = rng.choice(self.zoom)
        part = min(1.0, max(frames - 1, 1) / (CLIP_FRAMES - 1))
        if zoom > 1 or part < 1:
            start = scene.start
            if zoom > 1:
                start = (rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9))
            else:
                # A random part of the way.
                dx, dy = world.MOTIONS[scene.motion]
                done = rng.uniform(0, 1 - part) * scene.travel
                start = (start[0] + dx * done, start[1] + dy * done)
            scene = replace(scene, size=scene.size * zoom, travel=scene.travel * part * zoom, start=start)
        return world.render(scene, frames, height, width).transpose(0, 1) * 2 - 1

    def _seed(self, index: int) -> int:
        return index if self.clips is None else derive_seed("demo", self.seed, index)
