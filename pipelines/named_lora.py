"""The LoRA of an adapter of ours in a transformer, beside those that are there; it goes without a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .errors import first_line

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
    """A LoRA under a name of its own.

    Args:
        pipe: pipeline of the transformer, whose `load_lora_weights` reads the matrices.
        part, transformer: name and module of the transformer.
        matrices: by their names in a file.
        name: of the LoRA among those of the transformer.
        file: name of its file, for messages.
        error: what is raised.

    Raises:
        ValueError: as `error`, where the name is taken, or the matrices do not fit.
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
        self._transformer, self._part, self._name, self._file, self._error = transformer, part, name, file, error
        self._layers: list[Any] = []
        self._first = not getattr(transformer, "peft_config", None)
        if not self._first and name in transformer.peft_config:
            raise error(f"the {part} has another LoRA called {name}: delete it first.")
        active = [] if self._first else transformer.active_adapters()
        second = {"load_into_transformer_2": True} if part == "transformer_2" else {}
        try:
            pipe.load_lora_weights(dict(matrices), adapter_name=name, **second)
            self._layers = lora_layers(transformer, name)
            if not self._layers:  # diffusers only logs it
                raise LookupError(f"nothing in it is for a {type(transformer).__name__}")
            for layer in self._layers:
                # Beside the others, whose weights stay: diffusers' set_adapters would set them all.
                layer.set_adapter([a for a in (*active, name) if a in layer.lora_A])
                layer.requires_grad_(False)
        except BaseException as reason:
            self.remove()
            if isinstance(reason, (ValueError, RuntimeError, LookupError)):
                raise error(f"{file} cannot be loaded: {first_line(reason)}") from reason
            raise

    def keep_active(self) -> None:
        """Have it count in the next forward pass: `load_lora_weights` and `set_adapters` leave only the LoRAs active
        that they were given, without a word.

        Raises:
            ValueError: as the `error` of the construction, where it is gone, or switched off with all LoRAs.
        """
        if self._name not in (getattr(self._transformer, "peft_config", None) or {}):
            raise self._error(
                f"{self._file} was unloaded from the {self._part}, which is another model without it: remove() the "
                "handle and make it again, and take other LoRAs out by delete_adapters, not by unload_lora_weights."
            )
        for layer in self._layers:
            if layer.disable_adapters:
                raise self._error(
                    f"the LoRAs of the {self._part} are disabled, {self._file} among them, without which it is another "
                    "model: call enable_lora(), or the handle's remove()."
                )
            if layer.merged and self._name not in layer.merged_adapters:
                raise self._error(
                    f"other LoRAs are fused into the {self._part}, which leaves {self._file} out: call unfuse_lora(), "
                    "or fuse them before the handle is made."
                )
            if self._name not in layer.active_adapters:
                # Only what is active is changed: peft would have the others trained, too.
                learns = {parameter: parameter.requires_grad for parameter in layer.parameters()}
                layer.set_adapter([*layer.active_adapters, self._name])
                for parameter, before in learns.items():
                    parameter.requires_grad_(before)

    def remove(self) -> None:
        """Take it out. A second call does nothing."""
        self._layers = []
        held = getattr(self._transformer, "peft_config", None) or {}
        if self._first and set(held) <= {self._name}:
            if held:
                self._transformer.unload_lora()  # with the layers that were put round the model's own
        elif self._name in held:
            self._transformer.delete_adapters(self._name)


def lora_layers(transformer: nn.Module, adapter: str) -> list[Any]:
    """The layers of a transformer that have the LoRA of that name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in transformer.modules() if isinstance(m, BaseTunerLayer) and adapter in getattr(m, "lora_B", ())]


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
