"""Files of adapters that the trainer wrote: a LoRA, what was trained beside it, and in the header what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .adapter_header import FACTS
from .run_folder import FILE, NoAdapter, chosen_adapter

if TYPE_CHECKING:
    import torch


def read_header(
    location: str | Path, recipes: str | tuple[str, ...], error: type[ValueError]
) -> tuple[Path, Mapping[str, Any], Mapping[str, list[int]]]:
    """The file of an adapter, what its header says, and the shapes of its tensors by name.

    Args:
        location: of the file, its folder, or that of a run, see `run_folder.adapter_path`.
        recipes: one of which must have made it.
        error: what is raised.

    Raises:
        ValueError: as `error`, where there is no such file, one of another recipe, or one that is damaged.
    """
    from ..loras.contents import misshapen

    try:
        path = chosen_adapter(location)
    except NoAdapter as reason:
        raise error(str(reason)) from reason
    if path.is_dir():
        raise error(f"{path} holds no adapter ({FILE}): give the file, or the folder of its training.")
    try:
        with safe_open(path, "pt") as file:
            facts: Any = json.loads((file.metadata() or {}).get(FACTS, "{}"))
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError, ValueError) as reason:
        raise error(f"{path} is no adapter that can be read: {reason}") from reason
    stated = facts.get("recipe") if isinstance(facts, dict) else None
    wanted = (recipes,) if isinstance(recipes, str) else recipes
    if stated not in wanted:
        kind = f"an adapter of the recipe {stated}" if stated else "not written by this package's trainer"
        raise error(f"{path} is {kind}: give one that the recipe {' or '.join(wanted)} made.")
    if why := misshapen(shapes):
        raise error(f"{path} {why}.")
    return path, facts, shapes


def read_split(
    path: Path, beside: Callable[[str], bool], error: type[ValueError] = ValueError
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of an adapter: the matrices of the LoRA, and what was trained beside it.

    Args:
        path: of the file.
        beside: whether a tensor of that name is beside the LoRA.
        error: what is raised.

    Raises:
        ValueError: as `error`, where a tensor holds no weights.
    """
    from ..loras.contents import without_numbers

    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    for name, tensor in tensors.items():
        if why := without_numbers(name, tensor):
            raise error(f"{path} {why}.")
    return ({n: t for n, t in tensors.items() if not beside(n)}, {n: t for n, t in tensors.items() if beside(n)})
