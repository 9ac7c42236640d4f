"""LoRAs for a diffusers pipeline: what a chain of nodes asks for, in the words of a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..pipelines.lora_files import TARGETS, LoraError, LoraFile, WrongTransformer, attach_loras, check_readable
from .wording import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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
        InputError: the pipeline takes none, lacks the transformer that one is for, or a file does not fit it.
    """
    try:
        attach_loras(pipe, loras)
    except LoraError as error:
        fix = " Choose all." if isinstance(error, WrongTransformer) else ""
        raise InputError(f"loras: {error}{fix}") from error
