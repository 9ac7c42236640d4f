"""What a request's model learned of VSA: gates, and the settings that they were trained with."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...pipelines.loras.files import TRANSFORMERS
from ..errors import BadInput

if TYPE_CHECKING:
    from ...pipelines.acceleration.vsa_gates import TrainedVSA
    from ..models.facts import ModelFacts


def trained_settings(facts: ModelFacts, pipe: Any) -> dict[str, Any] | None:
    """The settings of `VSA` that a model was trained with; empty for a loaded one that states none, None for one
    without gates.

    Args:
        facts: of the model. pipe: the pipeline, where it was given loaded.

    Raises:
        BadInput: its transformers state different ones, or what nobody can read.
    """
    from ...pipelines.acceleration.families import find_transformers
    from ...pipelines.acceleration.vsa_gates import VSAError, find_trained, published, read_config
    from ...pipelines.files.weight_files import HubError
    from ...pipelines.trained_for import origins_of

    try:
        if pipe is not None:  # whether it has gates is seen when they are read
            origins = origins_of(find_transformers(pipe))
            return _settings(find_trained(origins) or find_trained(origins, unstated=True)) or {}
        places = [(facts.location, part) for part in TRANSFORMERS]
        found = next((trained for place in places if (trained := read_config(*place))), None)
        return _settings(found or next((trained for place in places if (trained := published(*place))), None))
    except (VSAError, HubError) as error:
        raise BadInput("method", str(error).rstrip("."), value="vsa") from error


def _settings(trained: TrainedVSA | None) -> dict[str, Any] | None:
    return None if trained is None else asdict(trained)
