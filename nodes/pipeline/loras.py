"""LoRAs for a diffusers pipeline: what a chain of nodes asks for, in the words of a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...pipelines.loras.files import (
    TARGETS,
    TRANSFORMERS,
    LoraError,
    LoraFile,
    WrongTransformer,
    attach_loras,
    check_readable,
    of_run,
)
from ...pipelines.loras.targets import ContradictedTarget, UnclearTarget, check_target
from ..report.wording import InputError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


AUTOMATIC = "automatic"
"""In the node: the transformer that the file says that it was trained for."""


@dataclass(frozen=True)
class Lora(LoraFile):
    """One LoRA of a chain; see `LoraFile`.

    Raises:
        InputError: there is no such file, it is of another kind or cannot be read, a run has no LoRA, or there is no
            such target.
    """

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise InputError(f"path is {self.path}: there is no such file or folder.")
        if self.target is not None and self.target not in TARGETS:
            raise InputError(f"transformer is {self.target}: it must be one of {', '.join(TARGETS)}.")
        try:
            object.__setattr__(self, "path", of_run(self).path)
            check_readable(self.path)
        except LoraError as error:
            raise InputError(f"path: {error}") from error


def attach(pipe: DiffusionPipeline, loras: Sequence[Lora]) -> None:
    """Load LoRAs into a pipeline, beside those that it has already.

    Raises:
        InputError: the pipeline takes none, lacks the transformer that one is for, or a file does not fit it; or it has
            two, and which one a LoRA is for is not chosen. Or it is chosen otherwise than the file says.
    """
    parts = [name for name in TRANSFORMERS if getattr(pipe, name, None) is not None]
    try:
        if hasattr(pipe, "load_lora_weights"):
            for lora in loras:
                check_target(lora, parts)
        attach_loras(pipe, loras)
    except ContradictedTarget as error:
        told = f"transformer is {error.target}, and {error.name} says that it was trained for {error.known}"
        raise InputError(f"{told}: choose {AUTOMATIC if error.known in parts else 'all'}.") from error
    except UnclearTarget as error:
        raise InputError(
            f"loras: {error.name} is by its name for one of the two transformers alone: set transformer of its "
            f"Pipeline LoRA to {error.likely}, or to all where it is for both."
        ) from error
    except LoraError as error:
        fix = " Choose all." if isinstance(error, WrongTransformer) else ""
        raise InputError(f"loras: {error}{fix}") from error
