"""The recipes, one file each: a class derived from `base.Recipe`, and one line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..config import ConfigError, nearest

if TYPE_CHECKING:
    from .base import Recipe

RECIPES: dict[str, tuple[str, str]] = {
    "ae_adapt": ("ae_adapt", "AEAdapt"),
    "autoencoder": ("autoencoder", "TrainAutoencoder"),
    "consistency": ("consistency", "TrainConsistency"),
    "gft": ("gft", "TrainGuidanceFree"),
    "length": ("length", "TrainLength"),
    "lora": ("lora", "TrainLora"),
    "sla": ("sla", "TrainSLA"),
    "tiny_decoder": ("tiny_decoder", "TrainTinyDecoder"),
}
"""Name -> (module, class)."""


def find(name: str) -> type[Recipe]:
    """The class of a recipe; "ae-adapt" is "ae_adapt".

    Raises:
        ConfigError: no such recipe.
    """
    key = name.replace("-", "_")
    if key not in RECIPES:
        raise ConfigError(f'there is no recipe "{name}": {nearest(key, RECIPES)}')
    module, cls = RECIPES[key]
    return getattr(importlib.import_module(f".{module}", __name__), cls)
