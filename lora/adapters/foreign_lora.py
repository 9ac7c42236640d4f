"""LoRAs that other tools made, as a training goes on from them: what diffusers reads of their files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..config import ConfigError


def read_foreign(
    path: Path, loader: Any, shapes: Mapping[str, torch.Size], rank: int, scale: float, setting: str
) -> dict[str, torch.Tensor]:
    """The matrices of a LoRA by the parameters' names as peft gives them.

    Args:
        path: of the file: of diffusers, ComfyUI, diffusion-pipe, musubi-tuner, as the pipeline reads them.
        loader: class of the pipeline, with diffusers' `lora_state_dict`.
        shapes: of the weights of the layers that get a LoRA, by their names in the transformer.
        rank, scale: of the LoRA that they are for, the scale being alpha / rank.
        setting: that names the file, for messages.

    Raises:
        ConfigError: no LoRA, or one of other layers, of another rank, or of another model.
    """
    matrices, own = _matrices(path, loader, setting)
    if missing := [layer for layer in shapes if layer not in matrices]:
        raise ConfigError(
            f"{setting}: {path} has nothing for the layer {missing[0]}: set lora.targets to its own, "
            f"{_targets(matrices)}."
        )
    if more := [layer for layer in matrices if layer not in shapes]:
        raise ConfigError(
            f"{setting}: {path} has the layer {more[0]}, which lora.targets does not take: set it to "
            f"{_targets(matrices)}."
        )
    made = {}
    for layer, shape in shapes.items():
        down, up = (matrices[layer][letter].float() for letter in "AB")
        if (up.shape[0], *down.shape[1:]) != tuple(shape):
            raise ConfigError(
                f"{setting}: {path} is for another model: its {layer} is {[up.shape[0], *down.shape[1:]]}, and here "
                f"{list(shape)}."
            )
        if len(down) != rank:
            raise ConfigError(f"lora.rank is {rank}, but {layer} in {setting} has {len(down)}: set that.")
        made[f"{layer}.lora_A.default.weight"] = down
        made[f"{layer}.lora_B.default.weight"] = up * (own / scale)
    return made


def _matrices(path: Path, loader: Any, setting: str) -> tuple[dict[str, dict[str, torch.Tensor]], float]:
    """The two matrices of each layer, "A" and "B", and what their product is multiplied by."""
    try:
        found, *_, facts = loader.lora_state_dict(str(path.parent), weight_name=path.name, return_lora_metadata=True)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise ConfigError(
            f"{setting}: {path} is no LoRA that diffusers reads for a {loader.__name__}: {error}"
        ) from error
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    other = []
    for name, value in found.items():
        place = re.fullmatch(r"transformer\.(.+)\.lora_([AB])\.weight", name)
        if place is None:
            other.append(name)
        else:
            matrices.setdefault(place[1], {})[place[2]] = value
    other += [layer for layer, pair in matrices.items() if len(pair) < 2]
    if other or not matrices:
        what = f"such as {other[0]}" if other else "in any layer of the transformer"
        raise ConfigError(f"{setting}: {path} is no plain LoRA: it has {'parts' if other else 'nothing'} {what}.")
    stated = {key.rpartition(".")[2]: value for key, value in (facts or {}).items()}
    if stated.get("alpha_pattern") or stated.get("rank_pattern") or stated.get("use_dora") or stated.get("use_rslora"):
        raise ConfigError(f"{setting}: {path} is no plain LoRA: its ranks or scales differ from layer to layer.")
    if {"lora_alpha", "r"} <= stated.keys():
        return matrices, float(stated["lora_alpha"]) / float(stated["r"])
    return matrices, 1.0  # diffusers multiplies an alpha in where a file has one


def _targets(matrices: Mapping[str, Any]) -> str:
    """The layers of a file as `lora.targets` names them."""
    return f"[{', '.join(sorted({re.sub(r'^.*?[.][0-9]+[.]', '', layer) for layer in matrices}))}]"
