"""The keyword arguments of `vidaccel.generate` for type checkers: all but `compare`, by which its result differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import torch

    from ...attention.methods.base import Method
    from ...pipelines.guidance_cache.settings import GuidanceCache
    from ...pipelines.loras.files import LoraFile
    from ...pipelines.presets import Cache, Compile, Preset, Quantize


class GenerateOptions(TypedDict, total=False):
    """Of `vidaccel.generate`, which says what they are."""

    method: str | Method | Sequence[str | Method] | None
    negative_prompt: str
    image: Any
    last_image: Any
    video: Any
    strength: float | None
    face_video: Any
    frames: int | None
    height: int | None
    width: int | None
    steps: int | None
    guidance_scale: float | None
    seed: int
    fps: float | None
    density: float | None
    dense_steps: int | float | None
    dense_layers: int | float | None
    settings: Mapping[str, Mapping[str, Any]] | None
    pipeline_options: Mapping[str, Any] | None
    backend: str
    measure_error: int
    precision: str | None
    device: str | torch.device
    dtype: str | torch.dtype
    offload: bool | str
    tiling: bool
    lora: str | Path | LoraFile | Sequence[str | Path | LoraFile] | None
    guidance_free: bool | str | Path | Sequence[str | Path] | None
    sla: str | Path | Sequence[str | Path] | None
    rope: str
    components: str | Path | None
    preset: str | Path | Preset | None
    cache: str | Cache | None
    guidance_cache: int | GuidanceCache | None
    quantize: str | Quantize | None
    compile: bool | str | Compile | None
    decoder: str | Path | None
    out: str | Path | None
    report: str | Path | None
    warm_up: bool
    progress: bool
