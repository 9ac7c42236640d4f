"""Files of a LoRA as stock diffusers and ComfyUI read them, with what the LoRA belongs to in their header.

The update of a layer is the product of its two matrices, without an alpha: loaders do not agree where an alpha is kept,
so it is multiplied in. Names are those of `OwnModel.file_name`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..pipelines.adapter_header import FACTS, FILE
from .checkpoint import save_tensors
from .config import ConfigError


def save_lora(
    weights: Mapping[str, torch.Tensor],
    path: Path,
    name_of: Callable[[str], str],
    scale: float,
    facts: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    beside: Sequence[str] = (),
) -> Path:
    """Write the LoRA among the parameters of a transformer.

    Args:
        weights: by the parameters' names as peft gives them, in float32.
        path: of the file.
        name_of: the file's name for a layer.
        scale: alpha / rank.
        facts: what it belongs to.
        dtype: of the numbers of the LoRA in the file.
        beside: names of other parameters that go into it as they are, in float32.

    Raises:
        NotWritten: it cannot be written; what was there is untouched.
    """
    tensors = {}
    for name, value in weights.items():
        layer, dot, matrix = name.partition(".lora_")
        if dot:
            letter = matrix[0]  # peft puts the name of the adapter behind it
            value = value.detach().cpu().float() * (scale if letter == "B" else 1.0)
            tensors[f"{name_of(layer)}.lora_{letter}.weight"] = value.to(dtype)
        elif name in beside:
            tensors[name] = value.detach().cpu().float()
    return save_tensors(tensors, path, {"format": "pt", FACTS: json.dumps(dict(facts), sort_keys=True)})


def lora_path(location: str | Path) -> Path:
    """The file of a LoRA, from it or from its folder."""
    path = Path(location).expanduser()
    return path / FILE if path.is_dir() else path


def read_facts(location: str | Path, setting: str) -> dict[str, Any]:
    """What the header of a LoRA says that it belongs to.

    Args:
        location: of the file or its folder.
        setting: that names it, for messages.

    Raises:
        ConfigError: there is none, or it was not written by this trainer.
    """
    path = lora_path(location)
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{setting}: {path} is no LoRA that can be read: {error}") from error
    if not isinstance(facts, dict) or not {"base", "base_hash", "part", "rank"} <= facts.keys():
        raise ConfigError(f"{setting}: {path} does not say which model it is for: give a LoRA that this trainer made.")
    return facts


def read_lora(
    location: str | Path,
    layers: Sequence[str],
    name_of: Callable[[str], str],
    scale: float,
    setting: str,
    beside: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """The matrices of a LoRA by the parameters' names as peft gives them.

    Args:
        location: of the file or its folder.
        layers: of the transformer that have a LoRA.
        name_of: the file's name for a layer.
        scale: alpha / rank of the LoRA that they are for.
        setting: that names the file, for messages.
        beside: names of other parameters in it.

    Raises:
        ConfigError: it has other layers, or lacks one of the other parameters.
    """
    path = lora_path(location)
    made = {}
    with safe_open(path, "pt") as file:
        known = set(file.keys())
        for layer in layers:
            for letter in "AB":
                name = f"{name_of(layer)}.lora_{letter}.weight"
                if name not in known:
                    raise ConfigError(
                        f"{setting}: {path} has nothing for the layer {layer}: set lora.targets to its own."
                    )
                known.remove(name)
                value = file.get_tensor(name).float()
                made[f"{layer}.lora_{letter}.default.weight"] = value / scale if letter == "B" else value
        for name in beside:
            if name not in known:
                raise ConfigError(f"{setting}: {path} lacks {name}: it was not written as a whole.")
            known.remove(name)
            made[name] = file.get_tensor(name).float()
    if known:
        raise ConfigError(
            f"{setting}: {path} has {len(known)} matrices more than lora.targets takes, such as {min(known)}: name all "
            "of its layers."
        )
    return made
