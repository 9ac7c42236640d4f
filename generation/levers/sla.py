"""What a request's model learned of SLA: adapters, and the settings that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.loras.files import TRANSFORMERS
from ..errors import BadInput, mention
from ..requests.values import places
from .methods import check_settings

if TYPE_CHECKING:
    from ...attention import SLA
    from ...attention.layout import VideoLayout
    from ...attention.methods.base import Method
    from ...pipelines.acceleration.sla import SLAAdapter
    from ..models.facts import ModelFacts


def sla_adapters(given: str | Path | Sequence[str | Path], names: Sequence[str]) -> tuple[SLAAdapter, ...]:
    """Adapters as they are asked for: a file or folder each, see `run_folder.adapter_path`.

    Args:
        given: the files or folders.
        names: of the methods that are asked for; none where the adapters say the method.

    Raises:
        BadInput: one is not there, or is none; or no run would use it.
    """
    if not (asked := places("sla", given)):
        return ()
    from ...pipelines.acceleration.sla import read_adapter
    from ...pipelines.acceleration.sla_weights import SLAError

    if names and "sla" not in names:
        raise BadInput("sla", f"is of use only with {mention('method')} sla", f"Add {mention('method')} sla.")
    try:
        return tuple(read_adapter(place) for place in asked)
    except SLAError as error:
        raise BadInput("sla", f"cannot be used: {str(error).rstrip('.')}") from error


def check_learned(method: Method, adapters: Sequence[SLAAdapter], facts: ModelFacts) -> None:
    """Raise BadInput for adapters of another model, and for a config with other settings than those of their training.

    Args:
        method: that they are for; another than SLA has none.
        adapters: of `sla_adapters`. facts: of the model, see `guidance.placed`.
    """
    from ...attention import SLA
    from ...pipelines.acceleration.sla_weights import SLAError

    for adapter in adapters:
        _check_base(adapter, facts)
        try:
            if isinstance(method, SLA):
                adapter.trained.check(method, method.schedule, adapter.path.name)
        except SLAError as error:
            raise BadInput("method", str(error).rstrip("."), value="sla") from error


def _check_base(adapter: SLAAdapter, facts: ModelFacts) -> None:
    from ...pipelines.files.weight_files import transformer_files

    if transformer_files(facts.location, adapter.part) != adapter.base_hash:
        problem = f"{adapter.path.name} was trained on {adapter.base} ({adapter.part}), and this model is another"
        raise BadInput("sla", problem, "Give an adapter of this one.")


def trained_method(
    adapters: Sequence[SLAAdapter],
    facts: ModelFacts,
    pipe: Any,
    layout: VideoLayout,
    density: float | None,
    overrides: Mapping[str, Any],
    schedule: Mapping[str, Any],
) -> SLA | None:
    """The method with the settings of the training, where what is asked for does not differ; None where there was none.

    Args:
        adapters: of the request.
        facts: of the model. pipe: the pipeline, where it was given loaded.
        layout, density, overrides: see `methods.build_method`.
        schedule: fields of the schedule that are asked for.

    Raises:
        BadInput: other settings than those of the training, or an adapter of another model.
    """
    from ...attention import SLA
    from ...pipelines.acceleration.families import find_transformers
    from ...pipelines.acceleration.sla import find_learned
    from ...pipelines.acceleration.sla_weights import SLAError, read_config
    from ...pipelines.files.weight_files import HubError
    from ...pipelines.trained_for import origins_of

    try:
        if adapters:
            found = [adapter.trained for adapter in adapters]
            for adapter in adapters if pipe is None else ():
                _check_base(adapter, facts)
        elif pipe is not None:
            found = [learned.trained for learned in find_learned(origins_of(find_transformers(pipe))).values()]
        else:
            found = [trained for part in TRANSFORMERS if (trained := read_config(facts.location, part)) is not None]
        if not found:
            return None
        check_settings("sla", overrides, density)
        own = found[0].method()
        try:
            changed = replace(own, **overrides, schedule=replace(own.schedule, **schedule))
            if density is not None:
                settings = {name: value for name, value in vars(changed).items() if name != "topk"}
                changed = SLA.for_density(layout, density, **settings)
        except (TypeError, ValueError) as error:
            raise BadInput("method", str(error).rstrip("."), value="sla") from error
        for trained in found:
            trained.check(changed, changed.schedule, "the model")
        return changed
    except (SLAError, HubError) as error:
        raise BadInput("method", str(error).rstrip("."), value="sla") from error
