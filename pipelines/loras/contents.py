"""What the matrices of a LoRA are for, held against the layers of a transformer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_OF = "transformer."
"""Begins the names of what goes into a transformer, as diffusers' loaders give them."""
DORA = "DoRA"
_OTHER_KINDS = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": DORA, "oft_": "OFT"}
"""Parts of names -> the kind of adapter that has such matrices."""
_HALF = re.compile(r"(.+)\.lora_([AB])\.((?:.+\.)?weight)")
"""The name of one of the two matrices of a layer."""
_AGAIN = "the file is damaged; save or download it again"
_OF_LORA = ("lora", "alpha", "diff")
"""Parts of the names of what LoRAs hold: matrices, their scales, and differences of whole weights and biases."""


def translated(loader: Any, place: Path) -> tuple[Mapping[str, torch.Tensor], Exception | None]:
    """The matrices of a LoRA by diffusers' names; none, and why, where its loader for a pipeline cannot translate them.

    Args:
        loader: the pipeline, or its class.
        place: file or folder of the LoRA.
    """
    folder, file = (place.parent, {"weight_name": place.name}) if place.is_file() else (place, {})
    try:
        made = loader.lora_state_dict(str(folder), **file)
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        return {}, error
    return (made[0] if isinstance(made, tuple) else made), None


def layers_of(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Its modules by name, without what peft has put round them."""
    return {name: getattr(module, "base_layer", module) for name, module in transformer.named_modules()}


def misfit(matrices: Mapping[str, torch.Tensor], modules: Mapping[str, torch.nn.Module], kind: str) -> str:
    """Why a LoRA is not for a transformer, in words behind its name; "" where some of it is.

    Args:
        matrices: see `translated`.
        modules: of the transformer, by name. kind: its class.
    """
    if why := broken(matrices):
        return why
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


def broken(matrices: Mapping[str, torch.Tensor]) -> str:
    """What makes a LoRA one for no model, in words behind its name; "" where nothing does.

    diffusers fills up what is missing with random numbers, and loads numbers that are none.

    Args:
        matrices: see `translated`.
    """
    why = misshapen({key: value.shape for key, value in matrices.items()})
    return why or next(filter(None, (without_numbers(key, value) for key, value in matrices.items())), "")


def misshapen(shapes: Mapping[str, Sequence[int]]) -> str:
    """Which matrix of a LoRA is none or lacks its other half, as `broken`; by their names, whatever begins these."""
    for key, shape in shapes.items():
        half = _HALF.fullmatch(key)
        if half is None:
            continue
        if len(shape) < 2:
            return f"has {key} of the shape {list(shape)}, where a matrix has two dimensions: {_AGAIN}"
        other = f"{half[1]}.lora_{'B' if half[2] == 'A' else 'A'}.{half[3]}"
        if other not in shapes:
            return f"has {key} without {other}, and a layer needs both: {_AGAIN}"
    return ""


def without_numbers(key: str, value: torch.Tensor) -> str:
    """Why a tensor holds no weights, as `broken`."""
    if not value.is_floating_point():
        return f"has {key} in {value.dtype}, which is no type of weights: {_AGAIN}"
    # Types of one byte have no test of their own.
    if not (value.float() if value.element_size() == 1 else value).isfinite().all():
        return f"has values in {key} that are NaN or infinite: {_AGAIN}"
    return ""


def unreadable(error: Exception, file: Path | None, kind: str) -> str:
    """Why diffusers makes no LoRA of a file, in words behind its name; "" where only it knows.

    Args:
        error: of its loader.
        file: of the LoRA; None where there is no single one.
        kind: class of the pipeline.
    """
    keys = _keys(file)
    if other := _other_kind(keys):
        return f"has matrices of {other}, which diffusers does not load into a {kind}: give a LoRA"
    foreign = [key for key in keys if not any(part in key for part in _OF_LORA)]
    if keys and len(foreign) == len(keys):
        return f"has no matrices of a LoRA, but {foreign[0]} and the like: give a LoRA"
    if foreign:
        return f"has {foreign[0]}, which is no matrix of a LoRA: take it out of the file"
    if isinstance(error, KeyError):
        return f"lacks {error.args[0]}, without which diffusers reads no file whose layers are named like this one's"
    return ""


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
    return _other_kind(_keys(file))


def _other_kind(keys: Sequence[str]) -> str:
    return next((kind for part, kind in _OTHER_KINDS.items() if any(part in key for key in keys)), "")


def _keys(file: Path | None) -> list[str]:
    """Of a safetensors file; none where it cannot be read, which is what loading it says."""
    from safetensors import SafetensorError, safe_open

    if file is None:
        return []
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError):
        return []
