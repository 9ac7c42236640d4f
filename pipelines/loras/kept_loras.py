"""LoRAs of ours in a transformer, which count in each of its passes until they are taken out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..hooks.unsaved import TAKE_OUT, Unsaved
from .noted_merges import NotedMerges, note_merges

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
        self._owned = True
        self._layers = [
            (layer, names)
            for layer in tuner_layers(transformer).values()
            if (names := [name for name in files if name in getattr(layer, "lora_B", ())])
        ]
        self.keep_active()
        self._merges = [note_merges(layer) for layer, _ in self._layers]
        self._hook = transformer.register_forward_pre_hook(self._before_pass)
        self._unsaved = Unsaved(transformer, self._why_not_saved)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._owned = False  # a transformer copied alone has no handle, unless one is copied, too, and says so

    def own(self) -> None:
        """Say that a handle will remove them. Not needed but in a copy."""
        self._owned = True

    @torch.compiler.disable
    def _before_pass(self, transformer: Any, args: tuple) -> None:
        self.keep_active()

    def keep_active(self) -> None:
        """Have them count in the next forward pass: `load_lora_weights` and `set_adapters` leave only the LoRAs active
        that they were given, without a word.

        Raises:
            ValueError: as the `error` of the construction, where one is gone, or switched off with all LoRAs. Of a
                transformer that was copied without its pipeline, those that are gone are forgotten.
        """
        held = getattr(self._transformer, "peft_config", None) or {}
        gone = {name for name in self._files if name not in held}
        for name in gone if self._owned else ():
            if not self._is_fused(name):
                raise self._error(
                    f"{self._files[name]} was unloaded from the {self._part}, which is another model without it: "
                    "remove() the handle and make it again, and take other LoRAs out by delete_adapters, not by "
                    "unload_lora_weights."
                )
        for layer, all_names in self._layers:
            if not (names := all_names if self._owned else [name for name in all_names if name not in gone]):
                continue
            if layer.disable_adapters:
                way_out = "the handle's remove()" if self._owned else "unload_lora()"
                raise self._error(
                    f"the LoRAs of the {self._part} are disabled, {self._named(names)} among them, without which it "
                    f"is another model: call enable_lora(), or {way_out}."
                )
            if layer.merged and any(name not in layer.merged_adapters for name in names):
                raise self._error(
                    f"other LoRAs are fused into the {self._part}, which leaves {self._named(names)} out: call "
                    "unfuse_lora(), or fuse them before the handle is made."
                )
            if missing := [name for name in names if name not in layer.active_adapters]:
                with learning_kept([layer]):
                    layer.set_adapter([*layer.active_adapters, *missing])

    def _named(self, names: Iterable[str]) -> str:
        return " and ".join(self._files[name] for name in names)

    def _is_fused(self, name: str) -> bool:
        """Whether a LoRA is in the weights of all its layers, where it counts although it was unloaded."""
        return all(name in layer.merged_adapters for layer, names in self._layers if name in names)

    def are_apart(self) -> bool:
        """Whether layers of theirs are in the transformer. Fused and unloaded, they are part of plain weights."""
        there = {id(module) for module in self._transformer.modules()}
        return any(id(layer) in there for layer, _ in self._layers)

    def _why_not_saved(self) -> str:
        if not self._files or not self.are_apart():
            return ""
        way_out = TAKE_OUT if self._owned else "call unload_lora(), after fuse_lora() where it is to count"
        return f"it has {self._named(self._files)} as a LoRA; {way_out}"

    def remove(self) -> None:
        """Take them out, also of weights that they were fused into. A second call does nothing.

        Raises:
            RuntimeError: they were fused into weights that are offloaded layer by layer; nothing was changed.
        """
        for layer, names in self._layers:
            if layer.get_base_layer().weight.is_meta and any(name in layer.merged_adapters for name in names):
                raise RuntimeError(
                    f"{self._named(names)} was fused into the {self._part}, whose weights are offloaded layer by layer "
                    "and cannot be changed there: take the offloading off first "
                    "(accelerate.hooks.remove_hook_from_module(model, recurse=True)), and call remove() again."
                )
        with contextlib.ExitStack() as stack:  # all of it, whatever one of them raises; the last first
            stack.callback(self._forget)
            if self._files:
                stack.callback(take_out, self._transformer, list(self._files))
            for merges in self._merges:
                stack.callback(merges.release)
            self._unfuse(stack)
            stack.callback(self._unsaved.remove)
            stack.callback(self._hook.remove)

    def _forget(self) -> None:
        self._transformer, self._files, self._layers, self._merges = None, {}, [], []

    def _unfuse(self, stack: contextlib.ExitStack) -> None:
        """Have the stack take them out of each weight, and log of which files that is so."""
        unfused: set[str] = set()
        stuck: set[str] = set()
        stack.callback(self._log_unfused, unfused, stuck)
        for (layer, names), merges in zip(self._layers, self._merges, strict=True):
            if fused := [name for name in names if name in layer.merged_adapters]:
                stack.callback(self._unfuse_layer, layer, merges, fused, unfused, stuck)

    def _unfuse_layer(
        self, layer: Any, merges: NotedMerges, fused: Sequence[str], unfused: set[str], stuck: set[str]
    ) -> None:
        others = [name for name in layer.merged_adapters if name not in fused]
        for matrices in (layer.lora_A, layer.lora_B):
            matrices.to(layer.get_base_layer().weight.device)  # unloaded, they did not move with the transformer
        files = {name: self._files[name] for name in fused}
        try:
            merges.unmerge()  # all that are fused: peft takes no names
        except BaseException:
            stuck.update(files.values())
            raise
        if others:
            layer.merge(adapter_names=others)
        for name, file in files.items():
            (unfused if name in layer.lora_A else stuck).add(file)

    def _log_unfused(self, unfused: set[str], stuck: set[str]) -> None:
        for file in sorted(unfused - stuck):
            logger.warning(
                "%s was fused into the %s, and is out of its weights again, which are as they were but for rounding",
                file,
                self._part,
            )
        for file in sorted(stuck):
            logger.warning(
                "%s was fused into the %s and cannot be taken out of all its weights (it was deleted since, or as the "
                "error says): load the pipeline again",
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
