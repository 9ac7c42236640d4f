"""The LoRA of an adapter of ours in a transformer, beside those that are there; it goes without a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..errors import first_line
from .kept_loras import KeptLoras, take_out, tuner_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import nn


class ForPart(Protocol):
    """A file that is for one transformer of a pipeline."""

    @property
    def path(self) -> Path: ...
    @property
    def part(self) -> str: ...


File = TypeVar("File", bound=ForPart)


class NamedLora:
    """A LoRA under a name of its own, which counts in each forward pass, see `KeptLoras`.

    Args:
        pipe: pipeline of the transformer, whose `load_lora_weights` reads the matrices.
        part, transformer: name and module of the transformer.
        matrices: by their names in a file.
        name: of the LoRA among those of the transformer.
        file: name of its file, for messages.
        error: what is raised.

    Raises:
        ValueError: as `error`, where the name is taken, the matrices do not fit, or it would not count.
    """

    def __init__(
        self,
        pipe: Any,
        part: str,
        transformer: Any,
        matrices: Mapping[str, torch.Tensor],
        name: str,
        file: str,
        error: type[ValueError],
    ) -> None:
        held = getattr(transformer, "peft_config", None) or {}
        if name in held:
            raise error(f"the {part} has another LoRA called {name}: delete it first.")
        active = transformer.active_adapters() if held else []
        second = {"load_into_transformer_2": True} if part == "transformer_2" else {}
        try:
            pipe.load_lora_weights(dict(matrices), adapter_name=name, **second)
            layers = lora_layers(transformer, name)
            if not layers:  # diffusers only logs it
                raise LookupError(f"nothing in it is for a {type(transformer).__name__}")
            for layer in layers:
                # Beside the others, whose weights stay: diffusers' set_adapters would set them all.
                layer.set_adapter([a for a in (*active, name) if a in layer.lora_A])
                layer.requires_grad_(False)
        except BaseException as reason:
            take_out(transformer, [name])
            if isinstance(reason, (ValueError, RuntimeError, LookupError)):
                raise error(f"{file} cannot be loaded: {first_line(reason)}") from reason
            raise
        try:
            self._kept = KeptLoras(part, transformer, {name: file}, error)
        except BaseException:
            take_out(transformer, [name])
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._kept.own()

    def is_apart(self) -> bool:
        """Whether layers of it are in the transformer, see `KeptLoras.are_apart`."""
        return self._kept.are_apart()

    def remove(self) -> None:
        """Take it out, see `KeptLoras.remove`. A second call does nothing."""
        self._kept.remove()


def lora_layers(transformer: nn.Module, adapter: str) -> list[Any]:
    """The layers of a transformer that have the LoRA of that name."""
    return [layer for layer in tuner_layers(transformer).values() if adapter in getattr(layer, "lora_B", ())]


def one_for_each(
    kind: str, parts: Iterable[str], files: Sequence[File], what: str, error: type[ValueError]
) -> dict[str, File]:
    """The file of each transformer of a pipeline.

    Args:
        kind: class of the pipeline, for messages.
        parts: names of its transformers.
        files: that were given. what: they are, in the plural.
        error: what is raised.

    Raises:
        ValueError: as `error`, where there is not one for each.
    """
    found = {file.part: file for file in files}
    if found.keys() != set(parts) or len(found) < len(files):
        given = ", ".join(f"{file.path.name} for {file.part}" for file in files) or "none"
        raise error(
            f"this {kind} has {' and '.join(parts)}, and the {what} are {given}: give one for each transformer."
        )
    return found
