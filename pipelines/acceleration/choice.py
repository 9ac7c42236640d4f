"""Which method a pipeline gets, where it is named or left open: what its transformers were trained for comes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...attention import SLA, VSA, Method, resolve_method
from ...attention.methods import check_settings
from ..default_method import DEFAULT_METHOD
from ..files.weight_files import HubError, transformer_names
from ..trained_for import Origin
from .sla import Learned, find_learned, method_of
from .sla_weights import PROJECTION, SLAError
from .vsa_gates import find_trained


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        method: with its settings.
        learned: of SLA, by the names of the transformers.
        why: more of it than that the model was trained for it.
        warnings: what a user should know.
    """

    method: Method
    learned: Mapping[str, Learned] = field(default_factory=dict)
    why: str = ""
    warnings: tuple[str, ...] = ()


def choose(
    method: Method | str | None,
    origins: Mapping[str, Origin],
    adapters: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
) -> Choice:
    """The method of a pipeline; the name of one that is trained stands for the settings of the training.

    Args:
        method, settings: see `accelerate`.
        origins: of the transformers.
        adapters: of SLA.
    """
    settings = settings or {}
    if method is None:
        if settings:
            name = next(iter(settings))
            raise TypeError(
                f"accelerate has no argument {name!r}, and a setting needs the name of its method: "
                f'accelerate(pipe, "{DEFAULT_METHOD}", {name}={settings[name]!r}).'
            )
        return _by_training(origins, adapters)
    if method == VSA.name:
        return _vsa(origins, adapters, settings)
    if method != SLA.name and not isinstance(method, SLA):
        chosen = resolve_method(method, **settings)
        if adapters:
            raise ValueError(f'adapter is for the method "sla", not for {chosen.name}: leave it out.')
        return Choice(chosen, warnings=_otherwise(chosen, origins))
    learned = _learned(method, origins, adapters)
    if not isinstance(method, str) or (settings and not learned):
        chosen = resolve_method(method, **settings)
        return Choice(chosen, learned, warnings=_otherwise(chosen, origins))
    check_settings(SLA, settings)
    return Choice(replace(method_of(learned, origins), **settings), learned)


def _learned(method: SLA | str, origins: Mapping[str, Origin], adapters: Sequence[str | Path]) -> Mapping[str, Learned]:
    try:
        return find_learned(origins, adapters)
    except HubError as error:
        if isinstance(method, SLA) and not method.needs_weights:
            return {}
        raise SLAError(f"what the model learned of SLA is not known: {error}.") from error


def _by_training(origins: Mapping[str, Origin], adapters: Sequence[str | Path]) -> Choice:
    """What the transformers were trained for; for none, or where that cannot be told, what suits all models."""
    if adapters:
        learned = find_learned(origins, adapters)
        return Choice(method_of(learned, origins), learned)
    warnings = []
    try:
        learned = find_learned(origins)
        if learned.keys() == origins.keys():
            return Choice(method_of(learned, origins), learned)
        if find_trained(origins) is not None or find_trained(origins, unstated=True) is not None:
            return _vsa(origins, adapters, {})
        for name, origin in origins.items():
            if name not in learned and origin.place and _has_projections(*origin.place):
                warnings.append(
                    f"the files of {name} have weights of SLA ({PROJECTION}), and nothing says what they were trained "
                    "for: they are not used"
                )
    except HubError as error:
        warnings.append(f"whether the model was trained for a method cannot be told: {error}")
    return Choice(resolve_method(DEFAULT_METHOD), warnings=tuple(warnings))


def _vsa(origins: Mapping[str, Origin], adapters: Sequence[str | Path], settings: Mapping[str, Any]) -> Choice:
    if adapters:
        raise ValueError(f'adapter is for the method "sla", not for {VSA.name}: leave it out.')
    why = ""
    try:
        found = find_trained(origins)
        if found is None and (found := find_trained(origins, unstated=True)) is not None and "density" not in settings:
            why = f"nothing states its density, so {found.density:g}, as FastVideo's scripts have it"
    except HubError:  # the gates are there, too, and what cannot be had is told where they are read
        found = None
    chosen = resolve_method(VSA.name, **({} if found is None else asdict(found)) | dict(settings))
    return Choice(chosen, why=why, warnings=_otherwise(chosen, origins))


def _otherwise(method: Method, origins: Mapping[str, Origin]) -> tuple[str, ...]:
    """What to say of transformers that were trained for another method, as far as they say so themselves."""
    return tuple(
        f"{name} was trained for {' and '.join(origin.told)}, and runs without what it learned for that"
        for name, origin in origins.items()
        if origin.told and not (method.name in origin.told and method.needs_weights)
    )


def _has_projections(base: str, part: str) -> bool:
    return any(f".{PROJECTION}." in name for name in transformer_names(base, part))
