"""Model families that `ae_adapt` can move to another autoencoder: one file each, derived from `base.Backbone`."""

from __future__ import annotations

from typing import Any

from ..config import ConfigError
from .base import Backbone

FAMILIES = {
    "WanPipeline": ("wan", "WanBackbone"),
    "WanImageToVideoPipeline": ("wan", "WanBackbone"),
    "FluxPipeline": ("flux", "FluxBackbone"),
    "SanaPipeline": ("sana", "SanaBackbone"),
}
"""Class of the base pipeline -> (module, class)."""


def open_backbone(base: str, autoencoder: str, **options: Any) -> Backbone:
    """The backbone of a base pipeline.

    Args:
        base: folder or hub id.
        autoencoder: folder or hub id of the new one.
        options: arguments of the backbone's class.

    Raises:
        ConfigError: no pipeline, one of another family, or parts that do not fit.
    """
    import importlib

    from diffusers import DiffusionPipeline

    try:
        name = DiffusionPipeline.load_config(base)["_class_name"]
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.base: {base} has no readable model_index.json: {error}") from error
    name = name[-1] if isinstance(name, list) else name
    if name not in FAMILIES:
        raise ConfigError(f"model.base: {base} is a {name}; ae_adapt takes {', '.join(FAMILIES)}.")
    module, cls = FAMILIES[name]
    return getattr(importlib.import_module(f".{module}", __name__), cls)(base, autoencoder, **options)
