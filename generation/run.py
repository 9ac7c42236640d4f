"""Load a pipeline, run it once, dense or accelerated, and time it."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import BadInput, first_line
from .model_facts import ModelFacts
from .report import GeneratedVideo
from .request import Settings, open_image

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..attention.methods.base import Method

StepCallback = Callable[[int, int], None]
"""Called with (steps done, steps of the run) at the end of every denoising step."""


class GenerationError(RuntimeError):
    """The model ran and made nothing usable."""


def load(
    model: ModelFacts, dtype: torch.dtype, device: torch.device, *, offload: bool = False, tiling: bool = False
) -> DiffusionPipeline:
    """Load the weights and place them.

    Raises:
        BadInput: weights that are missing or unreadable.
    """
    from ..pipelines.loading import load_pipeline

    try:
        chosen = {"pipeline_class": model.pipeline_class, "offload": offload, "tiling": tiling}
        return load_pipeline(model.location, dtype, device, **chosen)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {model.name} cannot be loaded: {first_line(error)}") from error


def generate(
    pipe: DiffusionPipeline,
    settings: Settings,
    name: str,
    method: Method | None,
    *,
    backend: str = "auto",
    on_step: StepCallback | None = None,
) -> GeneratedVideo:
    """Run the pipeline once, dense (`method=None`, the pipeline as it is) or accelerated, and time it.

    The initial noise comes from a CPU generator with the seed, so it is the same for every method and device.
    """
    from ..pipelines import accelerate

    if method is None:
        frames, seconds, marks = _run(pipe, settings, on_step)
        report = None
    else:
        with accelerate(pipe, method, backend=backend) as handle:
            frames, seconds, marks = _run(pipe, settings, on_step)
            report = handle.report().last()
    between = [b - a for a, b in itertools.pairwise(marks)]
    return GeneratedVideo(
        name=name,
        frames=frames,
        seconds=seconds,
        report=report,
        step_seconds=statistics.median(between) if between else None,
        decode_seconds=seconds - marks[-1],
    )


def warm_up(pipe: DiffusionPipeline, settings: Settings, method: Method | None, *, backend: str = "auto") -> float:
    """One step that is not counted, so that compilation and first-use costs stay out of the comparison.

    An accelerated warm-up is sparse in every layer, since a dense first step would compile nothing.

    Returns:
        What it took, in seconds.
    """
    from ..attention.schedule import DenseSchedule
    from ..pipelines import accelerate

    single = replace(settings, steps=1)
    if method is None:
        return _run(pipe, single, None)[1]
    with accelerate(pipe, method, backend=backend, schedule=DenseSchedule()):
        return _run(pipe, single, None, decode=False)[1]


def _run(
    pipe: DiffusionPipeline, settings: Settings, on_step: StepCallback | None, decode: bool = True
) -> tuple[Any, float, list[float]]:
    """Frames `[F, H, W, 3]` uint8 (None without decoding), seconds, and when each step ended."""
    import torch

    marks: list[float] = []

    def step_ended(_pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        _synchronise(device)
        marks.append(time.perf_counter() - start)
        if on_step is not None:
            on_step(step + 1, settings.steps)
        return {}

    inputs: dict[str, Any] = {}
    if settings.image is not None:
        from PIL.Image import Resampling

        size = (settings.width, settings.height)
        inputs["image"] = open_image(settings.image).resize(size, Resampling.LANCZOS)
    device = pipe._execution_device
    _synchronise(device)
    start = time.perf_counter()
    result = pipe(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(settings.seed),
        callback_on_step_end=step_ended,
        output_type="np" if decode else "latent",
        **inputs,
    )
    _synchronise(device)
    seconds = time.perf_counter() - start
    if not decode:
        return None, seconds, marks
    frames = result.frames[0]
    if not np.isfinite(frames).all():
        raise GenerationError("the model made NaN or Inf instead of a video: try --dtype bfloat16 or float32.")
    return (frames * 255).round().astype(np.uint8), seconds, marks


def _synchronise(device: torch.device) -> None:
    """Wait for a GPU, whose work would otherwise be timed in whatever waits for it next."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for a reader."""
    import torch

    from .. import __version__

    facts = {"vidaccel": __version__, "Python": platform.python_version()}
    facts.update({name: _version(name) for name in ("torch", "diffusers", "transformers", "triton")})
    facts["system"] = f"{platform.system()} {platform.machine()}"
    threads, cores = torch.get_num_threads(), os.cpu_count()
    facts["CPU"] = (
        f"{_cpu_name()}, {cores} logical core{'s' if cores != 1 else ''}, "
        f"torch uses {threads} thread{'s' if threads != 1 else ''}"
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["GPU"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    facts["device"] = str(device)
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
