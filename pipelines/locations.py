"""Folders and hub ids, told apart by their names; diffusers is not imported for it."""

from __future__ import annotations

import re
from pathlib import Path


def is_hub_id(location: str) -> bool:
    """Whether this has the form owner/name and is no folder here."""
    return not Path(location).is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", location) is not None


def is_single_file(location: str) -> bool:
    """Whether this names a file of weights, by its suffix, and no folder or hub id."""
    return location.endswith((".safetensors", ".gguf", ".ckpt", ".pt", ".pth")) and not Path(location).is_dir()


def named_autoencoder(folder: str | Path, name: str | None) -> str | None:
    """What an adapter calls its autoencoder: a folder, seen from that of the adapter, or a hub id; None for neither."""
    if not name:
        return None
    place = Path(folder) / name
    if place.is_dir():
        return str(place)
    return name if is_hub_id(name) else None
