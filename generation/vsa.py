"""What a request's model learned of VSA: gates, and the settings that they were trained with."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..pipelines.lora_files import TRANSFORMERS
from .errors import BadInput

if TYPE_CHECKING:
    from ..pipelines.acceleration.vsa_gates import TrainedVSA
    from .model_facts import ModelFacts


def trained_settings(facts: ModelFacts, pipe: Any) -> dict[str, Any] | None:
    """The settings of `VSA` that a model states; empty for a loaded one that states none, None for one without gates.

    Args:
        facts: of the model. pipe: the pipeline, where it was given loaded.

    Raises:
        BadInput: its transformers state different ones, or what nobody can read.
    """
    from ..pipelines.acceleration.families import find_transformers
    from ..pipelines.acceleration.vsa_gates import VSAError, find_trained, read_config

    try:
        if pipe is not None:  # whether it has gates is seen when they are read
            transformers = {name: transformer for name, (transformer, _) in find_transformers(pipe).items()}
            return _settings(find_trained(transformers)) or {}
        return _settings(next((t for part in TRANSFORMERS if (t := read_config(facts.location, part))), None))
    except VSAError as error:
        raise BadInput("method", str(error).rstrip("."), value="vsa") from error


def _settings(trained: TrainedVSA | None) -> dict[str, Any] | None:
    return None if trained is None else asdict(trained)
