"""The guidance-free adapters of a request, checked before weights are read."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..requests.values import places

if TYPE_CHECKING:
    from ...pipelines.guidance_free.adapter_file import GuidanceFreeAdapter
    from ..models.facts import ModelFacts
    from ..requests.settings import Settings

TRANSFORMERS = ("transformer", "transformer_2")
"""The parts of a pipeline that have adapters."""


def guidance_adapters(given: str | Path | Sequence[str | Path]) -> tuple[GuidanceFreeAdapter, ...]:
    """Adapters as they are asked for: a file or folder each, see `run_folder.adapter_path`.

    Raises:
        BadInput: one is not there, or is none.
    """
    if not (asked := places("guidance_free", given)):
        return ()
    from ...pipelines.guidance_free.adapter_file import GuidanceFreeError, read_adapter

    try:
        return tuple(read_adapter(place) for place in asked)
    except GuidanceFreeError as error:
        raise BadInput("guidance_free", f"cannot be used: {str(error).rstrip('.')}") from error


def own_files(facts: ModelFacts) -> dict[str, Path | None]:
    """Transformer -> the file of the adapter that a model has of its own for it; None where it has none."""
    from ...pipelines.files.weight_files import transformer_file
    from ...pipelines.guidance_free.adapter_file import OWN_FILE

    return {part: transformer_file(facts.location, OWN_FILE, part) for part in transformers_of(facts)}


def own_adapters(facts: ModelFacts) -> tuple[GuidanceFreeAdapter, ...]:
    """The adapters that a model has of its own, one for each transformer.

    Raises:
        BadInput: it has none.
    """
    from ...pipelines.guidance_free.adapter_file import OWN_FILE

    files = own_files(facts)
    missing = [f"{part}/{OWN_FILE}" for part, file in files.items() if file is None]
    if missing:
        raise BadInput(
            "guidance_free",
            f"has no adapter to use: {facts.name} has none of its own ({' and '.join(missing)})",
            "Give the file or folder of one for this model, which the recipe gft makes.",
        )
    return guidance_adapters([file for file in files.values() if file is not None])


def adapters_beside(facts: ModelFacts) -> tuple[GuidanceFreeAdapter, ...]:
    """All adapters in the folders of a model's transformers, of whatever model they are.

    Of a model of the hub, only those that it has of its own: other names are not known without a folder.
    """
    from ...pipelines.files.weight_files import transformer_file
    from ...pipelines.guidance_free.adapter_file import OWN_FILE, GuidanceFreeError, read_adapter

    files: list[Path] = []
    for part in transformers_of(facts):
        folder = Path(facts.location, part)
        own = None if folder.is_dir() else transformer_file(facts.location, OWN_FILE, part)
        files += sorted(folder.glob("*.safetensors")) if own is None else [own]
    found = []
    for file in files:
        with contextlib.suppress(GuidanceFreeError):  # most are the weights themselves
            found.append(read_adapter(file))
    return tuple(found)


def transformers_of(facts: ModelFacts) -> list[str]:
    """The names of a model's transformers, by its files."""
    from ...pipelines.files.weight_files import stated_config

    return [part for part in TRANSFORMERS if stated_config(facts.location, part) is not None]


def placed(facts: ModelFacts, pipe: Any) -> ModelFacts:
    """What a model is, with the folder or hub id that its weights are from: a loaded pipeline need not know that.

    Args:
        facts: of the model. pipe: it, where it was given loaded; None otherwise.
    """
    if pipe is None:
        return facts
    from ...pipelines.acceleration.families import unwrap
    from ...pipelines.base_check import place_of

    parts = ((unwrap(part), name) for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None)
    place = next((place for part in parts if (place := place_of(*part)) is not None), None)
    return facts if place is None else replace(facts, location=place[0])


def check_adapters(adapters: Sequence[GuidanceFreeAdapter], facts: ModelFacts) -> None:
    """Raise BadInput for adapters of another model."""
    from ...pipelines.files.weight_files import transformer_files

    for adapter in adapters:
        if transformer_files(facts.location, adapter.part) != adapter.base_hash:
            problem = f"{adapter.path.name} was trained on {adapter.base} ({adapter.part}), and this model is another"
            raise BadInput("guidance_free", problem, "Give an adapter of this one.")


def check_guidance(adapters: Sequence[GuidanceFreeAdapter], facts: ModelFacts, settings: Settings) -> None:
    """Raise BadInput for adapters of another model, and for guidance that they cannot do.

    Args:
        adapters: of the request.
        facts: of the model.
        settings: checked.
    """
    from ...pipelines.guidance_free.adapter_file import GuidanceFreeError

    check_adapters(adapters, facts)
    for adapter in adapters:
        try:
            adapter.check_negative(settings.negative_prompt)
        except GuidanceFreeError as error:
            problem = str(error).removeprefix("negative_prompt ").rstrip(".")
            raise BadInput("negative_prompt", problem) from error
        scale, steps = settings.guidance_scale, settings.steps
        if scale is not None and (refusal := adapter.refused_scale(scale)):
            raise BadInput("guidance_scale", *refusal, value=scale)
        if adapter.sigmas is not None and steps != len(adapter.sigmas):
            problem = f"{adapter.path.name} was distilled to {len(adapter.sigmas)} steps"
            raise BadInput("steps", problem, "Give that, or leave it out.", value=steps)


def suited(settings: Settings, adapters: Sequence[GuidanceFreeAdapter], facts: ModelFacts) -> Settings:
    """The request with the steps and the guidance of adapters for few steps, where it leaves them open."""
    for adapter in adapters:
        if adapter.sigmas is None:
            continue
        if settings.steps is None:
            settings = replace(settings, steps=len(adapter.sigmas))
        usual = facts.call_defaults().get("guidance_scale")
        if settings.guidance_scale is None and usual is not None:
            nearest = min(max(float(usual), adapter.min_scale), adapter.max_scale)
            settings = replace(settings, guidance_scale=nearest)
    return settings


def guided_by(
    adapters: Sequence[GuidanceFreeAdapter], pipe: Any, facts: ModelFacts
) -> contextlib.AbstractContextManager:
    """A pipeline with the adapters of a request; as it is where there are none.

    Args:
        adapters: of the request.
        pipe: loaded. facts: of the model, see `placed`.

    Raises:
        BadInput: they do not fit the pipeline.
    """
    if not adapters:
        return contextlib.nullcontext()
    from ...pipelines.guidance_free.adapter_file import GuidanceFreeError
    from ...pipelines.guidance_free.handle import guidance_free

    try:
        return guidance_free(pipe, [adapter.path for adapter in adapters], base=facts.location)
    except GuidanceFreeError as error:
        raise BadInput("guidance_free", f"cannot be used: {str(error).rstrip('.')}") from error
