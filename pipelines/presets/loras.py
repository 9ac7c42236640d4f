"""The LoRAs of a preset in a pipeline, beside those that are there; they go without a trace."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..acceleration.families import unwrap
from ..files.adapter_header import facts_of
from ..loras.files import TRANSFORMERS, LoraError, LoraFile, attach_loras, check_readable
from ..loras.kept_loras import KeptLoras, learning_kept, take_out, tuner_layers
from ..loras.targets import check_target
from .errors import PresetError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_NAME = "preset"
"""Begins the names of the LoRAs, before an underscore and their number."""
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
        parts = {name: unwrap(part) for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None}
        before = {name: _state(part) for name, part in parts.items()}
        self._kept: list[KeptLoras] = []
        self.notes: list[str] = []
        """What of them has no place in the pipeline, in sentences."""
        try:
            with learning_kept(layer for part in parts.values() for layer in tuner_layers(part).values()):
                self.notes = attach_loras(pipe, loras, _NAME)
                for name, part in parts.items():
                    _put_back(part, before[name], _ours(part))  # `attach_loras` set those that were there to 1
            for name, part in parts.items():
                if ours := _ours(part):
                    files = {each: loras[int(each.removeprefix(f"{_NAME}_"))].path.name for each in ours}
                    self._kept.append(KeptLoras(name, part, files, _refused))
        except BaseException as error:
            self.remove()
            for name, part in parts.items():
                take_out(part, _ours(part))
                _put_back(part, before[name])
            if isinstance(error, LoraError):
                raise _refused(str(error)) from error
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for kept in self._kept:
            kept.own()

    def are_apart(self) -> bool:
        """Whether layers of theirs are in a transformer, see `KeptLoras.are_apart`."""
        return any(kept.are_apart() for kept in self._kept)

    def remove(self) -> None:
        """Take them out, see `KeptLoras.remove`. A second call does nothing."""
        with contextlib.ExitStack() as stack:  # of all transformers, whatever one of them raises
            for kept in self._kept:
                stack.callback(kept.remove)


def _refused(words: str) -> PresetError:
    return PresetError("loras", words.rstrip("."))


def _ours(part: Any) -> list[str]:
    return [name for name in getattr(part, "peft_config", None) or {} if name.startswith(f"{_NAME}_")]


_State = dict[str, tuple[list[str], dict[str, float]]]


def _state(part: Any) -> _State:
    """Of each layer with LoRAs, those that are active and how strong each is."""
    return {path: (list(layer.active_adapters), dict(layer.scaling)) for path, layer in tuner_layers(part).items()}


def _put_back(part: Any, before: _State, ours: Sequence[str] = ()) -> None:
    """Have the LoRAs that were there be as active and as strong as they were, with ours beside them."""
    layers = {path: layer for path, layer in tuner_layers(part).items() if path in before}
    with learning_kept(layers.values()):
        for path, layer in layers.items():
            active, scaling = before[path]
            layer.set_adapter([*active, *(name for name in ours if name in layer.scaling)])
            layer.scaling.update(scaling)


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
        if not os.path.exists(lora.path):
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
        if taken := _ours(getattr(pipe, name, None)):
            raise PresetError("loras", f"the {name} has a LoRA called {taken[0]} already", "Delete it first.")
    return [note for note in notes if note]
