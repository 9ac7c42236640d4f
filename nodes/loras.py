"""LoRAs for a diffusers pipeline: what a chain of nodes asks for, in the words of a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..pipelines.lora_files import (
    TARGETS,
    TRANSFORMERS,
    LoraError,
    LoraFile,
    WrongTransformer,
    attach_loras,
    check_readable,
    trained_for,
)
from ..pipelines.lora_targets import named_for
from .wording import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


AUTOMATIC = "automatic"
"""In the node: the transformer that the file says that it was trained for."""


@dataclass(frozen=True)
class Lora(LoraFile):
    """One LoRA of a chain; see `LoraFile`.

    Raises:
        InputError: there is no such file or it cannot be read, or there is no such target.
    """

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise InputError(f"path is {self.path}: there is no such file or folder.")
        if self.target is not None and self.target not in TARGETS:
            raise InputError(f"transformer is {self.target}: it must be one of {', '.join(TARGETS)}.")
        try:
            check_readable(self.path)
        except LoraError as error:
            raise InputError(f"path: {error}") from error


def attach(pipe: DiffusionPipeline, loras: Sequence[Lora]) -> None:
    """Load LoRAs into a pipeline, beside those that it has already.

    Raises:
        InputError: the pipeline takes none, lacks the transformer that one is for, or a file does not fit it; or it has
            two, and which one a LoRA is for is not chosen, or chosen otherwise than its file says.
    """
    parts = [name for name in TRANSFORMERS if getattr(pipe, name, None) is not None]
    for lora in loras:
        _check_chosen(lora, parts)
    try:
        attach_loras(pipe, loras)
    except LoraError as error:
        fix = " Choose all." if isinstance(error, WrongTransformer) else ""
        raise InputError(f"loras: {error}{fix}") from error


def _check_chosen(lora: Lora, parts: Sequence[str]) -> None:
    """Raise InputError where it is not clear which of two transformers a LoRA is for."""
    if len(parts) < 2:
        return
    known, name = trained_for(lora.path), lora.path.name
    if known is not None and lora.target not in (None, known):
        raise InputError(
            f"transformer is {lora.target}, and {name} says that it was trained for {known}: choose {AUTOMATIC}."
        )
    if known is None and lora.target is None and (likely := named_for(lora)):
        raise InputError(
            f"loras: {name} is by its name for one of the two transformers alone: set transformer of its Pipeline LoRA "
            f"to {likely}, or to all where it is for both."
        )
