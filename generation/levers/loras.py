"""The LoRAs of a request, from texts, and into a loaded pipeline."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...pipelines.files.adapter_header import facts_of
from ...pipelines.loras.files import TARGETS, LoraError, LoraFile, attach_loras, check_readable, of_run
from ...pipelines.loras.targets import check_target
from ..errors import BadInput, mention
from ..requests.values import check_name
from .guidance import transformers_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.facts import ModelFacts

_Given = str | os.PathLike | LoraFile


def lora_files(given: _Given | Sequence[_Given] | None) -> tuple[LoraFile, ...]:
    """LoRAs as they are asked for, each from its file or the folder of that: `asked_loras`, checked.

    Raises:
        BadInput: there is no such file, it cannot be read, or is an adapter of another kind; or a text that has another
            form.
    """
    loras = asked_loras(given)
    for lora in loras:
        check_name("lora", lora.path)
        if not lora.path.exists():
            raise BadInput("lora", "there is no such file or folder", value=lora.path)
    try:
        loras = tuple(of_run(lora) for lora in loras)
    except LoraError as error:
        raise _refused(error) from error
    for lora in loras:
        _check_file(lora)
    return loras


def asked_loras(given: _Given | Sequence[_Given] | None) -> tuple[LoraFile, ...]:
    """LoRAs as they are asked for: a file or folder each, or "TARGET:PATH=WEIGHT", or a `LoraFile`.

    WEIGHT is a number, without it 1. TARGET is of `TARGETS`, the transformer that it goes into; without it that which
    the file of our trainer says, and of another file all that a pipeline has (see `check_targets`).

    Raises:
        BadInput: a text that has another form, or a weight that is no number.
    """
    if given is None:
        return ()
    each = [given] if isinstance(given, str | os.PathLike | LoraFile) else given
    if not isinstance(each, list | tuple) or not all(isinstance(one, str | os.PathLike | LoraFile) for one in each):
        raise BadInput(
            "lora", 'it must be a file or folder, or a list of them, such as ["a.safetensors=0.8"]', value=repr(given)
        )
    return tuple(
        replace(one, path=Path(one.path).expanduser()) if isinstance(one, LoraFile) else _lora_file(str(one))
        for one in each
    )


def _lora_file(text: str) -> LoraFile:
    """The LoRA that a text asks for; BadInput where it has another form, or names no file."""
    if not text.strip():
        raise BadInput("lora", "is empty", "Give a file or folder, or leave it out.")
    target, rest = _with_target(text)
    if not rest or rest.startswith("="):
        raise BadInput("lora", "it has the form PATH or PATH=WEIGHT, or TARGET: before one of them", value=text)
    place, weight = Path(rest).expanduser(), 1.0
    if not os.path.exists(place):
        name, equals, number = rest.rpartition("=")
        try:
            place, weight = (Path(name).expanduser(), float(number)) if equals else (place, weight)
        except ValueError:
            raise BadInput("lora", "what follows = must be its weight, a number", value=text) from None
    if not math.isfinite(weight):
        raise BadInput("lora", "its weight must be finite", value=text)
    return LoraFile(place, weight, target)


def _with_target(text: str) -> tuple[str | None, str]:
    """The target before a colon, and what follows it. A file that is called so is taken for itself, and other words
    before a colon, such as a drive, are part of the path."""
    head, colon, rest = text.partition(":")
    if not colon or head not in TARGETS or os.path.exists(Path(text).expanduser()):
        return None, text
    return head, rest


def _check_file(lora: LoraFile) -> None:
    """Raise BadInput for a LoRA that cannot be read, or is an adapter of another kind."""
    if lora.target is not None and lora.target not in TARGETS:
        raise BadInput("lora", f"its target must be one of {', '.join(TARGETS)}, not {lora.target}", value=lora.path)
    try:
        check_readable(lora.path)
    except LoraError as error:
        raise _refused(error) from error
    one_pass = ("a guidance-free adapter", "guidance_free")
    kinds = {"gft": one_pass, "consistency": one_pass, "sla": ("an adapter of SLA", "sla")}
    if (recipe := facts_of(lora.path).get("recipe")) in kinds:
        kind, field = kinds[recipe]
        raise BadInput("lora", f"is {kind}", f"Give it as {mention(field)}.", value=lora.path)


def check_targets(loras: Sequence[LoraFile], facts: ModelFacts) -> list[str]:
    """What a user should know of where LoRAs go in a model with two transformers, a sentence each.

    Args:
        loras: of the request.
        facts: of the model.

    Raises:
        BadInput: one is for a transformer that the model does not have, or for one of two, and it is not said which.
    """
    parts = transformers_of(facts) if loras else []
    try:
        return [note for lora in loras if parts and (note := check_target(lora, parts))]
    except LoraError as error:
        raise _refused(error) from error


def attach(pipe: DiffusionPipeline, loras: Sequence[LoraFile]) -> list[str]:
    """Load LoRAs into a pipeline that was loaded for a request.

    Returns:
        See `attach_loras`.

    Raises:
        BadInput: one does not fit the pipeline.
    """
    try:
        return attach_loras(pipe, loras)
    except LoraError as error:
        raise _refused(error) from error


def _refused(error: LoraError) -> BadInput:
    return BadInput("lora", f"cannot be used: {str(error).rstrip('.')}")
