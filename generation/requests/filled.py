"""A request with what its preset says where it says nothing itself, and errors that tell which of both is meant."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, mention, worded
from ..levers.methods import DENSE
from ..levers.presets import LEVERS, with_levers

if TYPE_CHECKING:
    from ...attention.methods.base import Method
    from ...pipelines.presets import Preset
    from .settings import Settings
    from .sparse import Sparse

NONE = "none"
"""As LoRAs or adapters: none of those that a preset has."""
_IN_PRESETS = {
    "lora": "loras",
    "steps": "num_inference_steps",
    "sla": "attention.adapters",
    "method": "attention.method",
    "backend": "attention.backend",
    "precision": "attention.precision",
}
"""What a field of a request is called in a preset, where that is another name."""


@dataclass(frozen=True)
class Filled:
    """A request and its preset as one.

    Args:
        settings, sparse: of the request, with what the preset says of them.
        preset: with the levers of the request; None where there is neither.
        method: that of the preset, where it is the one that runs.
        lora, guidance_free, sla: as `job.prepare` takes them.
        of_preset: fields whose value is the preset's.
        notes: in sentences.
    """

    settings: Settings
    sparse: Sparse
    preset: Preset | None
    method: Method | None
    lora: Any
    guidance_free: Any
    sla: Any
    of_preset: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def filled(
    preset: Preset | None, levers: Mapping[str, Any], settings: Settings, sparse: Sparse, adapters: Mapping[str, Any]
) -> Filled:
    """A request with what its preset says where it says nothing itself.

    Backend and precision are of the preset's method, and come with it alone.

    Args:
        preset: of `request_preset`.
        levers: of `LEVERS`, those that the request has; None for those that it does not.
        settings, sparse: of the request.
        adapters: its `lora`, `guidance_free` and `sla`, empty where it has none; `NONE` leaves out the preset's.

    Raises:
        BadInput: a lever that is unknown or out of its bounds.
    """
    given: dict[str, Any] = {
        name: () if value is None or _is_none(value) else value for name, value in adapters.items()
    }
    if preset is not None and _is_none(adapters["guidance_free"]):
        preset = preset.replace(guidance_free=())  # before levers that it would refuse
    whole = with_levers(preset, **levers)
    if preset is None:
        return Filled(settings, sparse, whole, None, **given)
    theirs: dict[str, Any] = {name: True for name in LEVERS if levers.get(name) is None and getattr(preset, name)}
    of_settings: dict[str, Any] = {"steps": preset.num_inference_steps, "guidance_scale": preset.guidance_scale}
    for name, value in of_settings.items():
        if value is not None and getattr(settings, name) is None:
            settings, theirs[name] = replace(settings, **{name: value}), value
    method, notes = None, []
    if not sparse.methods and _is_none(adapters["sla"]) and preset.sla and preset.method.needs_weights:
        # Backend and precision go with the method.
        sparse = replace(sparse, methods=(DENSE,))
        name = preset.method.name
        told = f"{mention('method')} {name} for a model that was trained for it"
        notes.append(f"Without its adapters the preset's method {name} is left out, too; {told}.")
    elif not sparse.methods:
        method = preset.method
        of_method: dict[str, Any] = {"methods": (DENSE if method is None else method,)}
        of_method |= {"backend": preset.backend} if sparse.backend == "auto" else {}
        of_method |= {"precision": preset.precision} if sparse.precision is None else {}
        sparse, theirs = replace(sparse, **of_method), theirs | of_method | {"method": method}
    own = preset.guidance_free == ("own",) or preset.guidance_free
    of_sla = preset.sla if "sla" in sparse.names else ()
    for name, value in {"lora": preset.loras, "guidance_free": own, "sla": of_sla}.items():
        if value and not adapters[name]:
            given[name] = theirs[name] = value
    if preset.loras and given["lora"] and "lora" not in theirs:
        names = ", ".join(lora.path.name for lora in preset.loras)
        notes.append(f"What the preset has as loras ({names}) is not loaded: {mention('lora')} goes before it.")
    return Filled(settings, sparse, whole, method, **given, of_preset=frozenset(theirs), notes=tuple(notes))


def _is_none(given: Any) -> bool:
    """Whether it is `NONE`, by itself or alone in a list."""
    one = given[0] if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 1 else given
    return isinstance(one, str | os.PathLike) and os.fspath(one) == NONE


@contextlib.contextmanager
def said_of_preset(fields: Collection[str] | None = None) -> Iterator[None]:
    """What is wrong with fields whose values are a preset's, by the field that the request has: its preset.

    Where it is wrong with another field beside them, they are named as the preset's.

    Args:
        fields: see `Filled.of_preset`; None for all.
    """

    def is_theirs(field: str) -> bool:
        return fields is None or field in fields

    def name(field: str) -> str:
        return _IN_PRESETS.get(field, field) if is_theirs(field) else mention(field)

    def of_preset(field: str) -> str:
        # A method is mentioned as what to give, and not for its value.
        return f"{mention('preset')}'s {name(field)}" if is_theirs(field) and field != "method" else mention(field)

    try:
        yield
    except BadInput as error:
        if error.field == "preset":
            raise
        if not is_theirs(error.field):
            raise error.with_problem(worded(error.problem, of_preset)) from error.__cause__
        text = error.worded(name).replace(" cannot be used: ", ": ", 1).rstrip(".")
        raise BadInput("preset", f"cannot be used: {text}") from error
