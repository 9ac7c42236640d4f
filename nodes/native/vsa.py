"""VSA in a native MODEL, with the gates that its weights were trained with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..pipeline.pipelines import require_packages
from ..report.wording import InputError
from .geometry import diffusion_model_of
from .learned_layers import check_wan, learned_layers
from .override import NativeAttention
from .patch import sparsify

UNSTATED = (
    "the files do not say what the gates were trained for: density {:g} is that of FastVideo's scripts for a model of "
    "this size."
)


def gated(model: Any, location: Path, density: float = 0.0, **common: Any) -> tuple[Any, NativeAttention]:
    """A clone of a MODEL with VSA; the MODEL itself stays as it is.

    Args:
        model: ComfyUI's ModelPatcher of a Wan model that was trained for VSA.
        location: of the gates, see `find_gates`.
        density: share of the key cubes that are read; 0 for that of the training.
        common: `min_tokens`, `backend`, `measure_error` and `precision` of `sparsify`.

    Returns:
        The clone, and the object that holds its state and report.

    Raises:
        InputError: no gates there, those of another model, a MODEL of another class, or a density out of its bounds.
        ValueError: see `sparsify`.
    """
    require_packages("Apply VSA, which reads files of diffusers, needs")
    from ...pipelines.acceleration.vsa_files import find_gates
    from ...pipelines.acceleration.vsa_gates import VSAError

    if not 0 <= density <= 1:
        raise InputError(f"density is {density:g}: it lies between 0 and 1, and 0 is that of the training.")
    diffusion_model = diffusion_model_of(model)
    try:
        found = find_gates(location)
        check_wan(diffusion_model, found.path.name, "text to video")
        found.check_fits(len(diffusion_model.blocks), diffusion_model.dim)
        tensors = found.tensors()
    except VSAError as error:
        raise InputError(f"gates: {error}") from error
    # In the dtype that the model computes in, also where its own weights are kept in 8 bits.
    dtype = model.model.get_dtype_inference()
    gates = {layer: {kind: each.to(dtype) for kind, each in own.items()} for layer, own in tensors.items()}
    method = found.trained.method()
    method = replace(method, density=density or method.density)
    made, session = sparsify(
        model,
        lambda layout: method,
        name="VSA",
        settings={"gates": found.path.name, "density": method.density, "cube": method.cube},
        gates=learned_layers(model, gates),
        **common,
    )
    if not density and not found.stated:
        session.tell(UNSTATED.format(method.density))
    return made, session
