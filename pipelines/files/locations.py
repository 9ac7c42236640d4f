"""Folders and hub ids, told apart by their names; diffusers is not imported for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_OF_MODELS = ("model_index.json", "adapter.json", "pipeline", "adapter", "checkpoints", "config.yaml")
"""In the folder of a model, or of a training, which may have none yet."""


def is_hub_id(location: str) -> bool:
    """Whether this has the form owner/name and is no folder here."""
    return not os.path.isdir(location) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", location) is not None


def is_single_file(location: str) -> bool:
    """Whether this names a file of weights, by its suffix, and no folder or hub id."""
    return location.endswith((".safetensors", ".gguf", ".ckpt", ".pt", ".pth")) and not os.path.isdir(location)


def is_model(location: str | Path) -> bool:
    """Whether a model is there: its folder, that of a training, or a file of weights.

    Another file or folder may be called as a model on the hub is, such as that of a download that failed.
    """
    place = os.path.expanduser(location)
    if os.path.isfile(place):  # of a text that can be no path it is false, where Path raises
        return is_single_file(place)
    named = any(os.path.exists(os.path.join(place, name)) for name in _OF_MODELS)
    return named or (os.path.isdir(place) and any(Path(place).glob("*/config.json")))


def named_autoencoder(folder: str | Path, name: str | None) -> str | None:
    """What an adapter calls its autoencoder: a folder, seen from that of the adapter, or a hub id; None for neither."""
    if not name:
        return None
    place = Path(folder) / name
    if place.is_dir():
        return str(place)
    return name if is_hub_id(name) else None
