"""A TurboDiffusion checkpoint, checked key by key, whose parameters are converted one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from ...autoencoders.checkpoint_file import CheckpointError, check_suffix, read_file, read_folder
from ..acceleration.sla_weights import names_in
from .turbowan_names import clean, infer_config, naming_of, projection_of, published_name

PREFIXES = {"net": "net.", "net_ema": "net_ema."}
"""What a checkpoint of a training has in front of its weights, and of their averages."""
BLOCK = 128
"""Rows and columns of a weight that have one scale in the 8-bit files."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint whose every parameter is where it should be.

    Args:
        where: file or folder.
        config: arguments of `WanTransformer3DModel`.
        shapes: of what it becomes, by our names.
        dtypes: likewise.
        tensors: as they lie in the file, by published names; mapped into memory.
        places: our name -> published name; of a weight in 8 bits, without "int8_weight".
    """

    where: str
    config: Mapping[str, Any]
    shapes: Mapping[str, list[int]]
    dtypes: Mapping[str, torch.dtype]
    tensors: Mapping[str, torch.Tensor]
    places: Mapping[str, str]

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter by our name, in its shape, of floating point."""
        place = self.places[name]
        if place in self.tensors:
            return self.tensors[place].reshape(self.shapes[name])
        stem = place.removesuffix("weight")
        weight, scale = self.tensors[f"{stem}int8_weight"], self.tensors[f"{stem}scale"]
        return dequantised(weight, scale, self.dtypes[name])


def dequantised(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight `[out, in]` of 8 bits times `scale` `[ceil(out / 128), ceil(in / 128)]`, one for each block."""
    rows, columns = weight.shape
    made = torch.empty(rows, columns, dtype=dtype)
    for number, row_scales in enumerate(scale.float()):
        part = slice(number * BLOCK, (number + 1) * BLOCK)  # a row of blocks: little is in float32 at a time
        made[part] = weight[part].float() * row_scales.repeat_interleave(BLOCK)[:columns]
    return made


def read_checkpoint(place: Path, weights: str | None = None) -> Checkpoint:
    """Read a file, or the folder of a transformer, in any of the known layouts.

    Args:
        place: .pth, .pt or .safetensors; or a folder with diffusion_pytorch_model*.safetensors.
        weights: "net" or "net_ema", of a file that has both.

    Raises:
        CheckpointError: what it holds is not one whole model in one layout.
    """
    return checked(_parameters(place), str(place), weights)


def checked(state: Mapping[Any, Any], where: str, weights: str | None = None) -> Checkpoint:
    """The parameters of a checkpoint by their published names; for the rest, see `read_checkpoint`."""
    tensors = _named(state, where, weights)
    naming = naming_of(tensors, where)
    projection = projection_of(tensors, where)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    config = infer_config(shapes, naming, projection, where)
    wanted = shapes_of(config)
    places = {own: published_name(own, naming, projection) for own in wanted}
    dtypes = _check(tensors, wanted, places, where)
    return Checkpoint(where, config, wanted, dtypes, tensors, places)


def shapes_of(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of all parameters of a transformer with its projections, without allocating anything."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    head = config["attention_head_dim"]
    for name in names_in(f"blocks.{block}.attn1" for block in range(config["num_layers"])):
        shapes[name] = [head, head] if name.endswith("weight") else [head]
    return shapes


def _parameters(place: Path) -> dict[Any, Any]:
    if place.is_dir():
        return _in_folder(place)
    check_suffix(place, "TurboDiffusion")
    content = read_file(place)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise CheckpointError(f"{place} holds a {type(content).__name__}, not parameters by name.")
    return content


def _in_folder(folder: Path) -> dict[str, torch.Tensor]:
    """What diffusers wrote there, and otherwise all files of safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files or any(file.name.startswith("diffusion_pytorch_model") for file in files):
        return read_folder(folder)
    state: dict[str, torch.Tensor] = {}
    for part in map(read_file, files):
        twice = state.keys() & part.keys()
        if twice:
            raise CheckpointError(f"{folder} has {min(twice)} in two of its files: leave one model there.")
        state |= part
    return state


def _named(state: Mapping[Any, Any], where: str, weights: str | None) -> dict[str, torch.Tensor]:
    """Parameters by published names, without what stands before them."""
    there = [name for name, prefix in PREFIXES.items() if any(str(key).startswith(prefix) for key in state)]
    if weights is None and len(there) > 1:
        raise CheckpointError(f"{where} has {' and '.join(there)}: choose one with weights=.")
    if weights is not None and weights not in there:
        has = " and ".join(there) or "neither net nor net_ema"
        raise CheckpointError(f"{where} has {has}, so weights= cannot be {weights}.")
    chosen = weights or (there[0] if there else "")
    prefix = PREFIXES.get(chosen, "")
    others = tuple(PREFIXES[name] for name in there if name != chosen)
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if others and str(key).startswith(others):
            continue
        if not str(key).startswith(prefix):
            raise CheckpointError(f"{where} has the key {key} beside those of {chosen}: it is no TurboDiffusion model.")
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{where} has the key {key}, which is a {type(value).__name__} and no parameter.")
        name = clean(str(key).removeprefix(prefix))
        if name in found:
            raise CheckpointError(f"{where} has {name} twice, once as {key}: it was put together of several files.")
        found[name] = value
    return found


def _check(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, list[int]], places: Mapping[str, str], where: str
) -> dict[str, torch.dtype]:
    """The dtypes of what the parameters become; CheckpointError for the first that is missing, unknown or wrong."""
    used, dtypes = set(), {}
    for own, place in places.items():
        shape = wanted[own]
        stem = place.removesuffix("weight")
        eight_bits = f"{stem}int8_weight"
        if eight_bits in tensors and place in tensors:
            raise CheckpointError(f"{where} has both {place} and {eight_bits}: give a file in one layout.")
        if own.startswith("blocks.") and len(shape) == 2 and eight_bits in tensors:
            _fits(tensors, eight_bits, [shape], where, floating=False)
            _fits(tensors, f"{stem}scale", [[-(-size // BLOCK) for size in shape]], where)
            _fits(tensors, f"{stem}bias", [shape[:1]], where)
            used |= {eight_bits, f"{stem}scale"}
            dtypes[own] = tensors[f"{stem}bias"].dtype  # which has the one that the weight had
            continue
        flat = [[shape[0], shape[1] * shape[2] * shape[3] * shape[4]]] if len(shape) == 5 else []
        _fits(tensors, place, [shape, *flat], where)
        used.add(place)
        dtypes[own] = tensors[place].dtype
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise CheckpointError(
            f"{where} has {_count(unknown)} that a TurboDiffusion model does not have, such as {unknown[0]}: this is "
            "another model, or one put together of several files."
        )
    return dtypes


def _fits(
    tensors: Mapping[str, torch.Tensor],
    name: str,
    shapes: Iterable[list[int]],
    where: str,
    floating: bool = True,
) -> None:
    if name not in tensors:
        raise CheckpointError(f"{where} lacks {name}: it was not written as a whole.")
    tensor, shapes = tensors[name], list(shapes)
    if list(tensor.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise CheckpointError(f"{name} is {list(tensor.shape)} in {where}, but in a model of this size it is {wanted}.")
    if tensor.is_meta:
        raise CheckpointError(f"{where} has {name} without its numbers: it was saved before it was loaded.")
    if floating != tensor.is_floating_point() or not (floating or tensor.dtype == torch.int8):
        kind = "a floating-point type" if floating else "int8"
        raise CheckpointError(f"{name} is {str(tensor.dtype).removeprefix('torch.')} in {where}, but must be {kind}.")


def _count(names: list[str]) -> str:
    return f"{len(names)} keys" if len(names) > 1 else "a key"
