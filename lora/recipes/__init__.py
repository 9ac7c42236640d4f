"""The recipes, one file each: a class derived from `base.Recipe`, and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import ConfigError, nearest
from ..named_class import Row, named_class

if TYPE_CHECKING:
    from .base import Recipe

RECIPES: dict[str, Row] = {
    "ae_adapt": ("ae_adapt", "AEAdapt"),
    "autoencoder": ("autoencoder", "TrainAutoencoder"),
    "consistency": ("consistency", "TrainConsistency"),
    "gft": ("gft", "TrainGuidanceFree"),
    "length": ("length", "TrainLength"),
    "lora": ("lora", "TrainLora"),
    "sla": ("sla", "TrainSLA"),
    "tiny_decoder": ("tiny_decoder", "TrainTinyDecoder"),
}
"""Name -> (module, class); for one of somebody's own, its class, or "package.module:Class"."""


def find(name: str) -> type[Recipe]:
    """The class of a recipe; "ae-adapt" is "ae_adapt".

    Raises:
        ConfigError: no such recipe, or its class is not there.
    """
    key = name.replace("-", "_")
    if key not in RECIPES:
        raise ConfigError(f'there is no recipe "{name}": {nearest(key, RECIPES)}')
    return named_class(RECIPES[key], __name__)
