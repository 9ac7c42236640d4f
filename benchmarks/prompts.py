"""Videos of prompts with a built-in model, which several scripts make, time, and read from their pixels."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Made:
    """A video and what it took.

    Args:
        video: `[F, H, W, 3]` in [0, 1].
        right: what of its prompt it shows, by "shape", "colour", "background", "motion" and "all".
        seconds: of the whole call.
        cpu_seconds: of the calling thread, in the whole call.
        step_seconds: CPU-seconds of a step, the median without the first.
    """

    video: Any
    right: dict[str, bool]
    seconds: float
    cpu_seconds: float
    step_seconds: float


def make(pipe: Any, prompt: str, seed: int, frames: int, steps: int, scale: float) -> Made:
    """A video of 128x128.

    Args:
        pipe: the pipeline, as it is.
        prompt: one that the checker of the demo can read.
        seed: of the noise.
        frames, steps: of the video; 3 steps at the least.
        scale: of the guidance.
    """
    import torch

    from vidaccel.demo.checker import check

    began, ends = time.perf_counter(), [time.thread_time()]
    video = pipe(
        prompt,
        num_frames=frames,
        height=128,
        width=128,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=lambda pipe, step, t, tensors: ends.append(time.thread_time()) or tensors,
    ).frames[0]
    seconds, whole = time.perf_counter() - began, time.thread_time() - ends[0]
    right = check(torch.from_numpy(video).permute(0, 3, 1, 2)).agrees_with(prompt)
    taken = [after - before for before, after in itertools.pairwise(ends[1:])]
    return Made(video, right, seconds, whole, statistics.median(taken) if taken else whole)


def psnr(video: Any, other: Any) -> float:
    """Of two videos in [0, 1], in dB; 100 of equal ones."""
    import numpy as np

    return -10 * float(np.log10(max(1e-10, float(((video - other) ** 2).mean()))))
