"""Files of a LoRA as stock diffusers and ComfyUI read them, with what the LoRA belongs to in their header.

The update of a layer is the product of its two matrices, without an alpha: loaders do not agree where an alpha is kept,
so it is multiplied in. Names are those of `OwnModel.file_name`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...pipelines.files.adapter_header import FACTS
from ...pipelines.files.run_folder import FILE, NoAdapter, adapter_path
from ..checkpoints.written import save_tensors
from ..config import ConfigError

COMFYUI_FILE = "comfyui_lora.safetensors"
"""Beside `FILE`, for models whose layers ComfyUI knows by other names than diffusers."""

Rows = Callable[[str], tuple[slice, int] | None]
"""Layer -> its rows in the file's and their number in all, see `OwnModel.file_rows`."""


def _own_layer(layer: str) -> None:
    """Of models whose layers are all layers of the file."""


def save_lora(
    weights: Mapping[str, torch.Tensor],
    path: Path,
    name_of: Callable[[str], str],
    scale: float,
    facts: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    beside: Sequence[str] = (),
    rows_of: Rows = _own_layer,
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
        rows_of: the rows of a layer among those that are one in the file, see `OwnModel.file_rows`. Such a one has the
            rank of all of them together.

    Raises:
        NotWritten: it cannot be written; what was there is untouched.
    """
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    tensors = {}
    for name, value in weights.items():
        layer, dot, matrix = name.partition(".lora_")
        if dot:
            letter = matrix[0]  # peft puts the name of the adapter behind it
            matrices.setdefault(layer, {})[letter] = value.detach().cpu().float() * (scale if letter == "B" else 1.0)
        elif name in beside:
            tensors[name] = value.detach().cpu().float()
    for name, layers in _merged(matrices, name_of, rows_of).items():
        down = torch.cat([matrices[layer]["A"] for layer in layers])
        up = _side_by_side([matrices[layer]["B"] for layer in layers], [rows_of(layer) for layer in layers])
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down.to(dtype), up.to(dtype)
    return save_tensors(tensors, path, {"format": "pt", FACTS: json.dumps(dict(facts), sort_keys=True)})


def _merged(layers: Iterable[str], name_of: Callable[[str], str], rows_of: Rows) -> dict[str, list[str]]:
    """Name in the file -> the layers that it holds, in the order of their rows."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(name_of(layer), []).append(layer)
    return {
        name: sorted(members, key=lambda layer: place[0].start if (place := rows_of(layer)) else 0)
        for name, members in found.items()
    }


def _side_by_side(ups: Sequence[torch.Tensor], places: Sequence[tuple[slice, int] | None]) -> torch.Tensor:
    """The second matrix of layers that are one in the file: each in rows and columns of its own."""
    if places[0] is None:
        return ups[0]
    whole = torch.zeros(places[0][1], sum(up.shape[1] for up in ups))
    column = 0
    for up, place in zip(ups, places, strict=True):
        whole[place[0], column : column + up.shape[1]] = up
        column += up.shape[1]
    return whole


def lora_path(location: str | Path, setting: str) -> Path:
    """The file of a LoRA, from it, its folder, or that of a run, see `run_folder.adapter_path`.

    Args:
        location: of it.
        setting: that names it, for messages.

    Raises:
        ConfigError: the folder of a run that has none, or several.
    """
    try:
        path = adapter_path(location)
    except NoAdapter as error:
        raise ConfigError(f"{setting}: {error}") from error
    return path / FILE if path.is_dir() else path


def read_facts(path: Path, setting: str) -> dict[str, Any]:
    """What the header of a LoRA says that it belongs to.

    Args:
        path: of the file.
        setting: that names it, for messages.

    Raises:
        ConfigError: there is none, or it was not written by this trainer.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{setting}: {path} is no LoRA that can be read: {error}") from error
    if not isinstance(facts, dict) or not {"base", "base_hash", "part", "rank"} <= facts.keys():
        raise ConfigError(f"{setting}: {path} does not say which model it is for: give a LoRA that this trainer made.")
    return facts


def read_lora(
    path: Path,
    layers: Sequence[str],
    name_of: Callable[[str], str],
    scale: float,
    setting: str,
    beside: Sequence[str] = (),
    rows_of: Rows = _own_layer,
) -> dict[str, torch.Tensor]:
    """The matrices of a LoRA by the parameters' names as peft gives them.

    Args:
        path: of the file.
        layers: of the transformer that have a LoRA.
        name_of: the file's name for a layer.
        scale: alpha / rank of the LoRA that they are for.
        setting: that names the file, for messages.
        beside: names of other parameters in it.
        rows_of: as that of `save_lora`.

    Raises:
        ConfigError: it has other layers, or lacks one of the other parameters.
    """
    made = {}
    with safe_open(path, "pt") as file:
        known = set(file.keys())
        for merged, members in _merged(layers, name_of, rows_of).items():
            names = {letter: f"{merged}.lora_{letter}.weight" for letter in "AB"}
            if not known.issuperset(names.values()):
                raise ConfigError(
                    f"{setting}: {path} has nothing for the layer {members[0]}: set lora.targets to its own."
                )
            known.difference_update(names.values())
            down, up = (file.get_tensor(names[letter]).float() for letter in "AB")
            rank = len(down) // len(members)
            for number, layer in enumerate(members):
                own, place = slice(number * rank, (number + 1) * rank), rows_of(layer)
                made[f"{layer}.lora_A.default.weight"] = down[own]
                made[f"{layer}.lora_B.default.weight"] = up[slice(None) if place is None else place[0], own] / scale
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
