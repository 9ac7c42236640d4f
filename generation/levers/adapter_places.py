"""Which files are taken where a request names adapters, or its model, by the folders of their trainings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...pipelines.files.run_folder import taken
from ...pipelines.loras.files import LoraFile
from .loras import asked_loras

if TYPE_CHECKING:
    from ..models.facts import ModelFacts

_Place = str | Path | LoraFile


class _Read(Protocol):
    @property
    def path(self) -> Path: ...


def model_note(facts: ModelFacts) -> str:
    """A sentence where the folder of a training was given for its model; "" elsewhere."""
    given, found = Path(facts.name).expanduser(), Path(facts.location)
    return taken(given, found) if given.is_dir() and found.is_relative_to(given) else ""


def taken_notes(given: bool | _Place | Sequence[_Place] | None, read: Sequence[_Read]) -> list[str]:
    """A sentence for each folder of a training that was given for its adapter.

    Args:
        given: the places as they are asked for; True where none is, but the model's own are taken.
        read: the adapters of these places.
    """
    if given is None or isinstance(given, bool):
        return []
    places = [given] if isinstance(given, str | os.PathLike | LoraFile) else given
    told = []
    for place, found in zip(places, read, strict=False):  # a model's own are not given
        location = asked_loras(place)[0].path if isinstance(found, LoraFile) else Path(str(place))
        told.append(taken(location, found.path))
    return [note for note in told if note]
