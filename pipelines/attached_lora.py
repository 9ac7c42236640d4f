"""A LoRA in a transformer of a pipeline, beside others, that can be taken out without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .errors import first_line


class ForPart(Protocol):
    """A file that is for one transformer of a pipeline."""

    @property
    def path(self) -> Path: ...
    @property
    def part(self) -> str: ...


File = TypeVar("File", bound=ForPart)


class LoraNotAttached(ValueError):
    """A LoRA that a transformer cannot take; the message says why."""


def one_for_each(kind: str, parts: Iterable[str], files: Sequence[File], what: str) -> dict[str, File]:
    """The file of each transformer of a pipeline.

    Args:
        kind: class of the pipeline, for messages.
        parts: names of its transformers.
        files: that were given. what: they are, in the plural.

    Raises:
        LoraNotAttached: not one for each.
    """
    found = {file.part: file for file in files}
    if found.keys() != set(parts) or len(found) < len(files):
        given = ", ".join(f"{file.path.name} for {file.part}" for file in files) or "none"
        raise LoraNotAttached(
            f"this {kind} has {' and '.join(parts)}, and the {what} are {given}: give one for each transformer."
        )
    return found


class AttachedLora:
    """A LoRA at work in one transformer of a pipeline; the others that are active there stay so, with their weights.

    Args:
        pipe: the pipeline.
        part: name of the transformer in it. transformer: itself, without wrappers.
        weights: the matrices by their names in the file.
        name: of the LoRA among those of the transformer.
        file: name of its file, for messages.

    Raises:
        LoraNotAttached: it does not fit, or there is another one of that name.
    """

    def __init__(
        self, pipe: Any, part: str, transformer: Any, weights: Mapping[str, torch.Tensor], name: str, file: str | Path
    ) -> None:
        self.transformer, self.name = transformer, name
        self._first = not getattr(transformer, "peft_config", None)
        if not self._first and name in transformer.peft_config:
            raise LoraNotAttached(f"the {part} has another LoRA called {name}: delete it first.")
        active = [] if self._first else transformer.active_adapters()
        second = {"load_into_transformer_2": True} if part == "transformer_2" else {}
        try:
            pipe.load_lora_weights(dict(weights), adapter_name=name, **second)
            layers = lora_layers(transformer, name)
            if not layers:  # diffusers only logs it
                raise LookupError(f"nothing in it is for a {type(transformer).__name__}")
            for layer in layers:
                # Beside the others, whose weights stay: diffusers' set_adapters would set them all.
                layer.set_adapter([a for a in (*active, name) if a in layer.lora_A])
                layer.requires_grad_(False)
        except BaseException as error:
            self.remove()
            if isinstance(error, (ValueError, RuntimeError, LookupError)):
                raise LoraNotAttached(f"{file} cannot be loaded: {first_line(error)}") from error
            raise

    def remove(self) -> None:
        """Take it out. A second call does nothing."""
        held = getattr(self.transformer, "peft_config", None) or {}
        if self._first and set(held) <= {self.name}:
            if held:
                self.transformer.unload_lora()  # with the layers that were put round the model's own
        elif self.name in held:
            self.transformer.delete_adapters(self.name)


def lora_layers(transformer: nn.Module, adapter: str) -> list[Any]:
    """The layers of a transformer that have the LoRA of that name."""
    return [m for m in transformer.modules() if isinstance(m, BaseTunerLayer) and adapter in getattr(m, "lora_B", ())]
