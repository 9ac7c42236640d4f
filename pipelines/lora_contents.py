"""What the matrices of a LoRA are for, held against the layers of a transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_OF = "transformer."
"""Begins the names of what goes into a transformer, as diffusers' loaders give them."""
DORA = "DoRA"
_OTHER_KINDS = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": DORA, "oft_": "OFT"}
"""Parts of names -> the kind of adapter that has such matrices."""


def translated(loader: Any, place: Path) -> Mapping[str, torch.Tensor]:
    """The matrices of a LoRA by diffusers' names; none where its loader for a pipeline cannot translate them.

    Args:
        loader: the pipeline, or its class.
        place: file or folder of the LoRA.
    """
    folder, file = (place.parent, {"weight_name": place.name}) if place.is_file() else (place, {})
    try:
        made = loader.lora_state_dict(str(folder), **file)
    except (OSError, ValueError, RuntimeError, LookupError):
        return {}
    return made[0] if isinstance(made, tuple) else made


def layers_of(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Its modules by name, without what peft has put round them."""
    return {name: getattr(module, "base_layer", module) for name, module in transformer.named_modules()}


def misfit(matrices: Mapping[str, torch.Tensor], modules: Mapping[str, torch.nn.Module], kind: str) -> str:
    """Why a LoRA is not for a transformer, in words behind its name; "" where some of it is.

    Args:
        matrices: see `translated`.
        modules: of the transformer, by name. kind: its class.
    """
    found = 0
    for key, value in matrices.items():
        name = key.removeprefix(_OF)
        layer, first, _ = name.partition(".lora_A.")
        while layer not in modules and "." in layer:  # matrices of other kinds than a LoRA's are named otherwise
            layer = layer.rpartition(".")[0]
        module = modules.get(layer)
        if module is None or next(module.children(), None) is not None:
            continue
        found += 1
        width = getattr(module, "in_features", None)
        if first and width is not None and value.shape[1] != width:
            return f"is for layers of width {value.shape[1]}, and {layer} of this {kind} has {width}"
    return "" if found else f"has nothing for a {kind}: it is for another family"


def missing_layers(matrices: Mapping[str, torch.Tensor], modules: Mapping[str, torch.nn.Module]) -> list[str]:
    """Layers that a LoRA has matrices for and a transformer lacks; arguments as above."""
    return [layer for layer in _layers(matrices, ".lora_A.weight") if layer not in modules]


def biases_some(matrices: Mapping[str, torch.Tensor]) -> bool:
    """Whether a LoRA changes the biases of some of its layers, and not of others."""
    biased = set(_layers(matrices, ".lora_B.bias"))
    return bool(biased) and biased != set(_layers(matrices, ".lora_B.weight"))


def _layers(matrices: Mapping[str, torch.Tensor], end: str) -> Iterator[str]:
    return (key.removeprefix(_OF).removesuffix(end) for key in matrices if key.startswith(_OF) and key.endswith(end))


def other_kind(file: Path | None) -> str:
    """The kind of adapter that a safetensors file has instead of a LoRA, or beside it; "" where it has none.

    Args:
        file: None where there is none.
    """
    from safetensors import SafetensorError, safe_open

    if file is None:
        return ""
    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
    except (OSError, SafetensorError):
        return ""  # which is what loading it says
    return next((kind for part, kind in _OTHER_KINDS.items() if any(part in key for key in keys)), "")
