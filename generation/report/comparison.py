"""Videos that were made, and how far those of one prompt and seed are from one another."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BadInput
from ..media.notebook import Shown, in_html
from ..media.sound import Sound
from ..media.video import write_mp4
from ..outputs import check_file
from ..requests.values import file_name
from .decibel import of_mean_error

if TYPE_CHECKING:
    import torch

    from ...attention.account.records import RunReport
    from ...pipelines.presets import Account

MIN_COMPARED = 11
"""Pixels of the smallest side that can be compared: the size of SSIM's window."""


@dataclass(frozen=True, eq=False)
class GeneratedVideo:
    """One video and what making it took.

    Args:
        name: of the method.
        frames: `[F, H, W, 3]` uint8 RGB.
        seconds: wall time of the whole pipeline call: text encoding, denoising and decoding.
        report: what attention did; None for the untouched pipeline.
        step_seconds: median time from one step's end to the next; None with a single step.
        decode_seconds: time from the last step's end to the frames.
        warm_up_seconds: time of the uncounted step before, compilation included; None when there was none.
        fps: frames per second to play it with.
        notes: what was done to the pictures or the video that it starts from.
        sound: of models that make one; it is written with the video.
        account: what each step was, where a cache, layers in 8 bits or another scheduler are at work; else None.
    """

    name: str
    frames: np.ndarray
    seconds: float
    report: RunReport | None = None
    step_seconds: float | None = None
    decode_seconds: float | None = None
    warm_up_seconds: float | None = None
    fps: float = 16
    notes: tuple[str, ...] = ()
    sound: Sound | None = None
    account: Account | None = None

    def save(self, path: str | Path) -> Path:
        """Write the video as an MP4 file; see `video.write_mp4`.

        Raises:
            BadInput: the name has another ending, or no file can be written there.
        """
        file = file_name("path", path)
        check_file("path", file, ".mp4")
        return write_mp4(self.frames, file, self.fps, self.sound)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        density = "" if self.report is None else f", density {self.report.mean_density():.2f}"
        heard = "" if self.sound is None else ", with sound"
        size = f"{count} frames of {width}x{height}, {self.fps:g} frames per second{heard}"
        return f"<vidaccel video {self.name}: {size}, made in {self.seconds:.3g} s{density}>"

    def _repr_html_(self) -> str | None:
        return in_html([Shown(self.frames, self.fps, self.sound, repr(self).strip("<>"))])

    @property
    def denoise_seconds(self) -> float | None:
        """Time to the last step's end, text encoding included."""
        return None if self.decode_seconds is None else self.seconds - self.decode_seconds


def mean_psnr(values: Sequence[float]) -> float:
    """Mean of PSNRs in dB, over what differs; infinite where nothing does, NaN where something cannot be compared.

    What is identical has an infinite PSNR, and is left out. So a video that is far off in one frame and the same in all
    others has a lower mean than one that is a little off in all; `psnr_of_mean_error` counts every frame.
    """
    if any(map(math.isnan, values)):
        return math.nan
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.inf


def over_what_differs(identical: int) -> str:
    """What to say after a `mean_psnr` that leaves some frames out; "" where it leaves out none."""
    return f" over the frames that differ ({identical} identical)" if identical else ""


@dataclass(frozen=True)
class FrameMetrics:
    """How far a video is from its reference.

    Args:
        psnr: dB per frame; infinite for identical frames.
        ssim: per frame, 1.0 for identical frames.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def identical_frames(self) -> int:
        """Frames without any difference."""
        return sum(math.isinf(value) for value in self.psnr)

    @property
    def mean_psnr(self) -> float:
        """Mean over the frames that differ; infinite when none does."""
        return mean_psnr(self.psnr)

    @property
    def leaves_out(self) -> int:
        """Frames without any difference that `mean_psnr` leaves out; 0 where all are, of which it says so itself."""
        return self.identical_frames % len(self.psnr)

    @property
    def psnr_of_mean_error(self) -> float:
        """Of the mean squared error of all frames, of which those that are the same are a part."""
        return of_mean_error(self.psnr)

    @property
    def mean_ssim(self) -> float:
        """Mean over all frames."""
        return float(np.mean(self.ssim))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Videos of one prompt and seed, the first of which is the reference.

    Args:
        prompt: what they show.
        videos: the dense one first.
        tokens: length of the self-attention sequence.
        settings, environment: name -> value, shown as they are.
        command: the command line or call that makes it again.
        files: MP4 files of the videos, in the same order; empty where none were written yet.
        notes: what a reader should know, in sentences.
    """

    prompt: str
    videos: tuple[GeneratedVideo, ...]
    tokens: int
    settings: dict[str, str]
    environment: dict[str, str]
    command: str
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    metrics: dict[str, FrameMetrics] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.videos) < 2 or (self.files and len(self.videos) != len(self.files)):
            raise ValueError(
                f"a comparison needs two or more videos and a file each, got {len(self.videos)}, {len(self.files)}."
            )
        names = [video.name for video in self.videos]
        if len(set(names)) < len(names):
            raise ValueError(f"the videos of a comparison need names of their own, got {', '.join(names)}.")
        metrics = {v.name: compare(self.reference.frames, v.frames) for v in self.others}
        object.__setattr__(self, "metrics", metrics)

    def __repr__(self) -> str:
        return f"<vidaccel comparison: {'; '.join(self._captions())}{self._places()}>"

    def _repr_html_(self) -> str | None:
        pairs = zip(self.videos, self._captions(), strict=True)
        return in_html(Shown(video.frames, video.fps, video.sound, caption) for video, caption in pairs)

    def _captions(self) -> list[str]:
        """The name, the seconds and the distance to the reference of each video."""
        told = []
        for video in self.videos:
            own = self.metrics.get(video.name)
            near = "" if own is None else f", PSNR {own.mean_psnr:.1f} dB{over_what_differs(own.leaves_out)}"
            near = f", identical to {self.reference.name}" if own is not None and math.isinf(own.mean_psnr) else near
            told.append(f"{video.name} {video.seconds:.3g} s{near}")
        return told

    def _places(self) -> str:
        return f"; files {', '.join(map(str, self.files))}" if self.files else ""

    @property
    def reference(self) -> GeneratedVideo:
        """The video that the others are measured against."""
        return self.videos[0]

    @property
    def fps(self) -> float:
        """Frames per second of the videos."""
        return self.reference.fps

    @property
    def others(self) -> tuple[GeneratedVideo, ...]:
        """All but the reference."""
        return self.videos[1:]


def check_comparable(height: int, width: int, fix: str = "Give a larger video.") -> None:
    """Raise BadInput for a size, in pixels, of which frames cannot be compared; `fix` says what to do."""
    if min(height, width) < MIN_COMPARED:
        side, value = ("height", height) if height < width else ("width", width)
        problem = f"frames to compare have at least {MIN_COMPARED}x{MIN_COMPARED} pixels, as SSIM needs"
        raise BadInput(side, problem, fix, value=value)


def compare(reference: np.ndarray, other: np.ndarray) -> FrameMetrics:
    """PSNR and SSIM of every frame, as torchmetrics computes them on values in [0, 1].

    Args:
        reference, other: `[F, H, W, 3]` uint8.

    Raises:
        ValueError: the shapes differ, or the frames are under 11 pixels, the size of SSIM's window.
    """
    import torch

    if reference.shape != other.shape:
        raise ValueError(f"videos to compare must have one shape, got {reference.shape} and {other.shape}.")
    if min(reference.shape[1:3]) < MIN_COMPARED:
        got = f"{reference.shape[2]}x{reference.shape[1]}"
        raise ValueError(f"SSIM needs frames of at least {MIN_COMPARED}x{MIN_COMPARED} pixels, got {got}.")
    # float64 is best for SSIM, whose variances cancel, but 30 times slower on a CPU; float32 is good to 4 decimals.
    if torch.cuda.is_available():
        with contextlib.suppress(torch.OutOfMemoryError):  # such as where the pipeline is still there
            return _compare(reference, other, "cuda", torch.float64)
    return _compare(reference, other, "cpu", torch.float32)


def _compare(reference: np.ndarray, other: np.ndarray, device: str, dtype: torch.dtype) -> FrameMetrics:
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr, ssim = [], []
    for pair in zip(reference, other, strict=True):
        target, made = (torch.tensor(frame).permute(2, 0, 1)[None].to(device, dtype) / 255 for frame in pair)
        if torch.equal(target, made):
            psnr.append(math.inf)
            ssim.append(1.0)
            continue
        psnr.append(peak_signal_noise_ratio(made, target, data_range=1.0).item())
        similar = structural_similarity_index_measure(made, target, data_range=1.0)
        assert isinstance(similar, torch.Tensor)  # a pair of tensors only where it is asked for the contrast as well
        ssim.append(similar.item())
    return FrameMetrics(tuple(psnr), tuple(ssim))
