"""The LoRAs of a preset in a pipeline, beside those that are there; they go without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..adapter_header import facts_of
from ..lora_files import TRANSFORMERS, LoraError, LoraFile, attach_loras, check_readable
from ..lora_targets import check_target
from .errors import PresetError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_NAME = "preset"
"""Begins the names of the LoRAs."""
_OTHERS = {
    "gft": ("a guidance-free adapter", "Give it as guidance_free."),
    "sla": ("an adapter of SLA", "Give it in attention.adapters, with the method sla."),
    "length": ("for longer videos, with an attention of its own", "Use vidaccel.lengthen instead of a preset."),
}


class LorasAtWork:
    """LoRAs that were loaded beside others, whose weights stay what they were.

    Raises:
        PresetError: one does not fit.
    """

    def __init__(self, pipe: DiffusionPipeline, loras: Sequence[LoraFile]) -> None:
        self._parts = {name: part for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None}
        self._before = {name: _state(part) for name, part in self._parts.items()}
        try:
            attach_loras(pipe, loras, _NAME)
            for name, part in self._parts.items():
                _restore(part, self._before[name])  # `attach_loras` set those that were there to 1
        except BaseException as error:
            self.remove()
            if isinstance(error, LoraError):
                raise PresetError("loras", str(error).rstrip(".")) from error
            raise

    def remove(self) -> None:
        """Take them out. A second call does nothing."""
        for name, part in self._parts.items():
            held = list(getattr(part, "peft_config", None) or {})
            ours = [adapter for adapter in held if adapter.startswith(f"{_NAME}_")]
            if ours and len(ours) == len(held):
                part.unload_lora()  # with the layers that were put round the model's own
            elif ours:
                part.delete_adapters(ours)
                _activate(part, self._before[name])
        self._parts = {}


def _layers(part: Any) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in part.named_modules() if isinstance(module, BaseTunerLayer)}


_State = dict[str, tuple[list[str], dict[str, float]]]


def _state(part: Any) -> _State:
    """Of each layer with LoRAs, those that are active and how strong each is."""
    return {path: (list(layer.active_adapters), dict(layer.scaling)) for path, layer in _layers(part).items()}


def _restore(part: Any, before: _State) -> None:
    for path, layer in _layers(part).items():
        layer.scaling.update(before.get(path, ((), {}))[1])


def _activate(part: Any, before: _State) -> None:
    for path, layer in _layers(part).items():
        if path in before:
            layer.set_adapter(before[path][0])
            layer.scaling.update(before[path][1])
            layer.requires_grad_(False)


def check_loras(pipe: Any, loras: Sequence[LoraFile]) -> list[str]:
    """What a user should know of where LoRAs go, a sentence each; before one is loaded.

    Raises:
        PresetError: one is not there, of another kind, or for a transformer that the pipeline does not have; or it is
            not said for which of two it is, see `check_target`.
    """
    if not loras:
        return []
    if not hasattr(pipe, "load_lora_weights"):
        raise PresetError("loras", f"a {type(pipe).__name__} takes none", "Leave them out.")
    parts = [name for name in TRANSFORMERS if getattr(pipe, name, None) is not None]
    notes = []
    for lora in loras:
        if not lora.path.exists():
            raise PresetError("loras", "there is no such file or folder", "", lora.path)
        try:
            check_readable(lora.path)
        except LoraError as error:
            raise PresetError("loras", str(error).rstrip(".")) from error
        if (recipe := facts_of(lora.path).get("recipe")) in _OTHERS:
            kind, fix = _OTHERS[recipe]
            raise PresetError("loras", f"it is {kind}", fix, lora.path)
        try:
            notes.append(check_target(lora, parts))
        except LoraError as error:
            raise PresetError("loras", str(error).rstrip(".")) from error
    for name in TRANSFORMERS:
        held = getattr(getattr(pipe, name, None), "peft_config", None) or {}
        if taken := [adapter for adapter in held if adapter.startswith(f"{_NAME}_")]:
            raise PresetError("loras", f"the {name} has a LoRA called {taken[0]} already", "Delete it first.")
    return [note for note in notes if note]
