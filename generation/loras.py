"""The LoRAs of a request, from texts, and into a loaded pipeline."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipelines.lora_files import LoraError, LoraFile, attach_loras, check_readable, trained_for
from .errors import BadInput, mention

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def lora_files(given: str | Path | Sequence[str | Path] | None) -> tuple[LoraFile, ...]:
    """LoRAs as they are asked for: a file or folder each, "PATH=WEIGHT" with another weight than 1.

    Of a file of our trainer, the transformer that it is for is known; any other goes into all that a pipeline has.

    Raises:
        BadInput: there is no such file, it cannot be read, or the weight is no number.
    """
    if given is None:
        return ()
    if isinstance(given, tuple) and given and all(isinstance(each, LoraFile) for each in given):
        return _as_files(given)
    from ..pipelines.adapter_header import facts_of

    texts = [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str | os.PathLike) for text in texts):
        raise BadInput(
            "lora", 'it must be a file or folder, or a list of them, such as ["a.safetensors=0.8"]', value=repr(given)
        )
    made = []
    for text in map(str, texts):
        place, weight = Path(text).expanduser(), 1.0
        if not text.strip():
            raise BadInput("lora", "is empty", "Give a file or folder, or leave it out.")
        if text.startswith("="):
            raise BadInput("lora", "it has the form PATH or PATH=WEIGHT", value=text)
        if not place.exists():
            name, equals, number = text.rpartition("=")
            try:
                place, weight = (Path(name).expanduser(), float(number)) if equals else (place, weight)
            except ValueError:
                raise BadInput("lora", "what follows = must be its weight, a number", value=text) from None
        if not place.exists():
            raise BadInput("lora", "there is no such file or folder", value=place)
        if not math.isfinite(weight):
            raise BadInput("lora", "its weight must be finite", value=text)
        try:
            check_readable(place)
        except LoraError as error:
            raise _refused(error) from error
        one_pass = ("a guidance-free adapter", "guidance_free")
        kinds = {"gft": one_pass, "consistency": one_pass, "sla": ("an adapter of SLA", "sla")}
        if (recipe := facts_of(place).get("recipe")) in kinds:
            kind, field = kinds[recipe]
            raise BadInput("lora", f"is {kind}", f"Give it as {mention(field)}.", value=place)
        made.append(LoraFile(place, weight, trained_for(place)))
    return tuple(made)


def _as_files(loras: tuple[LoraFile, ...]) -> tuple[LoraFile, ...]:
    """LoRAs of a preset; BadInput where one is not there or cannot be read."""
    for lora in loras:
        if not lora.path.exists():
            raise BadInput("lora", "there is no such file or folder", value=lora.path)
        try:
            check_readable(lora.path)
        except LoraError as error:
            raise _refused(error) from error
    return loras


def attach(pipe: DiffusionPipeline, loras: Sequence[LoraFile]) -> None:
    """Load LoRAs into a pipeline that was loaded for a request.

    Raises:
        BadInput: one does not fit the pipeline.
    """
    try:
        attach_loras(pipe, loras)
    except LoraError as error:
        raise _refused(error) from error


def _refused(error: LoraError) -> BadInput:
    return BadInput("lora", f"cannot be used: {str(error).rstrip('.')}")
