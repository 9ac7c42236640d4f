"""LoRAs of ours in a transformer, which count in each of its passes until they are taken out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .unsaved import TAKE_OUT, Unsaved

logger = logging.getLogger(__name__)


class KeptLoras:
    """LoRAs that were loaded into a transformer, beside those of others.

    Args:
        part, transformer: name and module of the transformer, without what wraps it.
        files: names of their files, for messages, by the names of the LoRAs.
        error: makes what is raised of its words.

    Raises:
        ValueError: as `error`, see `keep_active`.
    """

    def __init__(
        self, part: str, transformer: Any, files: Mapping[str, str], error: Callable[[str], ValueError]
    ) -> None:
        self._part, self._transformer, self._files, self._error = part, transformer, dict(files), error
        self._layers = [
            (layer, names)
            for layer in tuner_layers(transformer).values()
            if (names := [name for name in files if name in getattr(layer, "lora_B", ())])
        ]
        self.keep_active()
        self._hook = transformer.register_forward_pre_hook(self._before_pass)
        self._unsaved = Unsaved(transformer, f"it has {' and '.join(files.values())} as a LoRA; {TAKE_OUT}")

    @torch.compiler.disable
    def _before_pass(self, transformer: Any, args: tuple) -> None:
        self.keep_active()

    def keep_active(self) -> None:
        """Have them count in the next forward pass: `load_lora_weights` and `set_adapters` leave only the LoRAs active
        that they were given, without a word.

        Raises:
            ValueError: as the `error` of the construction, where one is gone, or switched off with all LoRAs.
        """
        held = getattr(self._transformer, "peft_config", None) or {}
        for name, file in self._files.items():
            if name not in held and not self._is_fused(name):
                raise self._error(
                    f"{file} was unloaded from the {self._part}, which is another model without it: remove() the "
                    "handle and make it again, and take other LoRAs out by delete_adapters, not by "
                    "unload_lora_weights."
                )
        for layer, names in self._layers:
            files = " and ".join(self._files[name] for name in names)
            if layer.disable_adapters:
                raise self._error(
                    f"the LoRAs of the {self._part} are disabled, {files} among them, without which it is another "
                    "model: call enable_lora(), or the handle's remove()."
                )
            if layer.merged and any(name not in layer.merged_adapters for name in names):
                raise self._error(
                    f"other LoRAs are fused into the {self._part}, which leaves {files} out: call unfuse_lora(), "
                    "or fuse them before the handle is made."
                )
            if missing := [name for name in names if name not in layer.active_adapters]:
                with learning_kept([layer]):
                    layer.set_adapter([*layer.active_adapters, *missing])

    def _is_fused(self, name: str) -> bool:
        """Whether a LoRA is in the weights of all its layers, where it counts although it was unloaded."""
        return all(name in layer.merged_adapters for layer, names in self._layers if name in names)

    def remove(self) -> None:
        """Take them out, also of weights that they were fused into. A second call does nothing."""
        self._hook.remove()
        self._unsaved.remove()
        self._unfuse()
        take_out(self._transformer, list(self._files))
        self._layers, self._files = [], {}

    def _unfuse(self) -> None:
        unfused: set[str] = set()
        stuck: set[str] = set()
        for layer, names in self._layers:
            if not (fused := [name for name in names if name in layer.merged_adapters]):
                continue
            others = [name for name in layer.merged_adapters if name not in names]
            layer.unmerge()  # all that are fused: peft takes no names
            if others:
                layer.merge(adapter_names=others)
            for name in fused:
                (unfused if name in layer.lora_A else stuck).add(self._files[name])
        for file in sorted(unfused):
            logger.warning(
                "%s was fused into the %s, and is out of its weights again, which are as they were but for rounding",
                file,
                self._part,
            )
        for file in sorted(stuck):
            logger.warning(
                "%s was fused into the %s and then deleted, so the weights keep it: load the pipeline again",
                file,
                self._part,
            )


def tuner_layers(transformer: nn.Module) -> dict[str, Any]:
    """The layers of peft round those of a transformer, by path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}


@contextlib.contextmanager
def learning_kept(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block peft may change which LoRAs are active, which would have them trained, too."""
    learns = {parameter: parameter.requires_grad for layer in layers for parameter in layer.parameters()}
    try:
        yield
    finally:
        for parameter, before in learns.items():
            parameter.requires_grad_(before)


def take_out(transformer: Any, names: Sequence[str]) -> None:
    """Take LoRAs out of a transformer, where they are; others stay as they are, active or not.

    Args:
        transformer: a model of diffusers.
        names: of the LoRAs.
    """
    held = getattr(transformer, "peft_config", None) or {}
    ours = [name for name in names if name in held]
    if not ours:
        return
    if len(ours) == len(held):
        transformer.unload_lora()  # with the layers that were put round the model's own
        return
    layers = tuner_layers(transformer).values()
    with learning_kept(layers):
        for layer in layers:  # before they go: peft would make others active in their place
            layer.set_adapter([name for name in layer.active_adapters if name not in ours])
        transformer.delete_adapters(ours)
