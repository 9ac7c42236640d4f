"""LoRAs for longer videos in a MODEL of ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...attention import Method, VideoLayout
from ..report.wording import PRECISIONS, InputError
from .lora import with_lora
from .override import NativeAttention
from .patch import sparsify


def lengthened(
    model: Any,
    file: Path,
    weight: float,
    *,
    backend: str = "auto",
    measure_error: int = 0,
    precision: str = PRECISIONS[0],
) -> tuple[Any, NativeAttention]:
    """A clone of a MODEL with a LoRA for longer videos and the attention that it was trained for.

    Args:
        model: ComfyUI's ModelPatcher.
        file: of the LoRA, or its folder.
        weight: its update is multiplied by this.
        backend, measure_error, precision: see `sparsify`.

    Returns:
        The clone, and the object that holds its state and report.

    Raises:
        InputError: a file that cannot be read or is none of the recipe `length`, or was trained with dense attention or
            RIFLEx; or the model lacks a layer of it, or has it in another size. ValueError: see `sparsify`. Later, in a
            run: a video longer than those of the training.
    """
    from comfy.utils import load_torch_file

    # Not at ComfyUI's start: they stand in a package that imports diffusers, which takes seconds.
    from ...pipelines.length.adapter_file import read_length
    from ...pipelines.length.trained import LengthError

    try:
        adapter = read_length(file)
    except LengthError as error:
        raise InputError(f"lora: {error}") from error
    trained = adapter.trained
    if trained.method is None:
        raise InputError(f"lora: {trained.name} was trained with dense attention: load it with Load LoRA (Model Only).")
    if trained.riflex is not None:
        raise InputError(
            f"lora: {trained.name} was trained with RIFLEx, which native models cannot be given here: use it in a "
            "pipeline, through Pipeline LoRA."
        )

    def method_for(layout: VideoLayout) -> Method:
        trained.check_frames(layout.frames)
        return trained.method

    first = trained.method.schedule.first_layers
    patched, session = sparsify(
        model,
        method_for,
        name=trained.method.name,
        settings={"lora": trained.name, "density": round(trained.density, 3)},
        dense_layers=", ".join(map(str, range(int(first)))),
        backend=backend,
        measure_error=measure_error,
        precision=precision,
    )
    tensors = load_torch_file(str(adapter.path), safe_load=True)
    return with_lora(patched, tensors, weight, field="lora", file=trained.name), session
