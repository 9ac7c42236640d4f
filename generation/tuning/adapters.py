"""Adapters that guide in one pass, or in few steps: which a model has, and which of them a request can use."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...pipelines.presets.preset import OWN
from ..errors import BadInput, mention
from ..levers.guidance import adapters_beside, check_guidance, guidance_adapters, own_files, placed, transformers_of

if TYPE_CHECKING:
    from ...pipelines.guidance_free.adapter_file import GuidanceFreeAdapter
    from ..job import Job
    from ..models.facts import ModelFacts


@dataclass(frozen=True)
class AdapterLever:
    """An adapter, or one for each transformer.

    Args:
        places: their files.
        steps: that they were distilled to; None for those of any sampler.
        digest: of the files, so that what was measured is not taken for another's at the same place.
        own: they are those that the model has of its own.
    """

    places: tuple[str, ...]
    steps: int | None = None
    digest: str = ""
    own: bool = False

    @property
    def in_preset(self) -> tuple[str, ...]:
        """As `Preset.guidance_free` has them: the model's own by that word, which holds wherever the model is."""
        return (OWN,) if self.own else self.places

    @property
    def name(self) -> str:
        """Of the files, without what they end with."""
        return ", ".join(Path(place).stem for place in self.places)

    @property
    def label(self) -> str:
        """What users see."""
        return f"{self.name} ({f'{self.steps} steps, ' if self.steps else ''}one pass)"


def adapter_levers(job: Job, given: Sequence[str | Path]) -> tuple[tuple[AdapterLever, ...], dict[str, str]]:
    """The adapters to try; and those beside the model that cannot be, with why.

    Args:
        job: the dense video.
        given: files or folders; of a model with two transformers, those for the same steps go together. Without any,
            those in the folders of the transformers that were trained on these.

    Raises:
        BadInput: one that was given cannot be read, is of another model, or cannot do what is asked for.
    """
    scale = job.settings.guidance_scale
    if scale is None or scale <= 1:
        if given:
            problem = "there is no guidance that an adapter could do in one pass"
            raise BadInput("guidance_scale", problem, f"Raise it, or leave {mention('adapters')} out.", value=scale)
        return (), {}
    facts = placed(job.facts, job.pipe)
    if given:
        with _said_of_adapters():
            return tuple(_lever(job, facts, group) for group in _groups(facts, guidance_adapters(given))), {}
    made, refused = [], {}
    for group in _groups(facts, adapters_beside(facts)):
        try:
            made.append(_lever(job, facts, group))
        except BadInput as error:
            refused[", ".join(adapter.path.name for adapter in group)] = str(error).rstrip(".")
    return tuple(made), refused


@contextlib.contextmanager
def _said_of_adapters() -> Iterator[None]:
    """What is wrong with adapters, by the field that they were given in."""
    try:
        yield
    except BadInput as error:
        if error.field != "guidance_free":
            raise
        raise BadInput("adapters", error.problem, error.fix) from error


def _groups(facts: ModelFacts, adapters: Sequence[GuidanceFreeAdapter]) -> list[list[GuidanceFreeAdapter]]:
    """Those for the same steps together; of a model with one transformer, each by itself."""
    if len(transformers_of(facts)) < 2:
        return [[adapter] for adapter in adapters]
    made: dict[tuple[float, ...] | None, list[GuidanceFreeAdapter]] = {}
    for adapter in adapters:
        made.setdefault(adapter.sigmas, []).append(adapter)
    return list(made.values())


def _lever(job: Job, facts: ModelFacts, adapters: Sequence[GuidanceFreeAdapter]) -> AdapterLever:
    steps = None if adapters[0].sigmas is None else len(adapters[0].sigmas)
    check_guidance(adapters, facts, job.settings if steps is None else replace(job.settings, steps=steps))
    parts = transformers_of(facts)
    if sorted(adapter.part for adapter in adapters) != sorted(parts):
        names = ", ".join(adapter.path.name for adapter in adapters)
        problem = f"{names}: the model has {' and '.join(parts)}, and each needs one for the same steps"
        raise BadInput("guidance_free", problem, "Give one for each.")
    digest = hashlib.sha256()
    for adapter in adapters:
        digest.update(adapter.path.read_bytes())
    places = tuple(str(adapter.path.resolve()) for adapter in adapters)
    files = own_files(facts)
    own = all((file := files[a.part]) is not None and file.resolve() == a.path.resolve() for a in adapters)
    return AdapterLever(places, steps, digest.hexdigest()[:16], own)
