"""The files and folders that settings name: looked for together with all other faults, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import demo
from ..pipelines.files.locations import is_hub_id, is_single_file
from .backbones.folders import located
from .checkpoints.begun_from import KEPT, START, TEACHER
from .config import ConfigError

_AUTOENCODERS = ("model.autoencoder", "model.start")
_MODELS = ("model.base", "model.components", "sla.start", *_AUTOENCODERS)
"""Settings that name a model: a folder, a hub id or a built-in one."""
_FILES = (START, "decoder.start", TEACHER)
"""Settings that name a file, or the folder that it is in."""


def absent(content: Mapping[str, Any], continued: bool = False) -> list[str]:
    """A fault for each place that settings name and that is not there.

    Args:
        content: of a file of settings, not checked yet; what is no text is left to the check of its kind.
        continued: a run is continued, whose checkpoint may have what some of them named.
    """
    return [*_models(content), *_files(content, continued), *_folders(content)]


def _models(content: Mapping[str, Any]) -> Iterator[str]:
    for setting in _MODELS:
        named = _at(content, setting)
        if isinstance(named, str):
            if setting == "model.base" and is_single_file(named):
                if not Path(named).is_file():
                    yield f"{setting}: there is no file {named}: correct the path."
                continue
            try:
                if setting in _AUTOENCODERS:
                    located(named, setting, demo.DC, part="vae")
                else:
                    located(named, setting, *demo.MODELS)
            except ConfigError as error:
                yield str(error)


def _files(content: Mapping[str, Any], continued: bool) -> Iterator[str]:
    for setting in _FILES:
        if continued and setting in KEPT:
            continue
        named = _at(content, setting)
        if isinstance(named, str) and named != "own" and not (Path(named).exists() or is_hub_id(named)):
            yield f"{setting}: {named} is no file and no folder here: correct the path, or leave it out."


def _folders(content: Mapping[str, Any]) -> Iterator[str]:
    data = content.get("data")
    if not isinstance(data, Mapping) or data.get("kind", "demo") == "demo":
        return
    listed = data.get("folders")
    several = enumerate(listed) if isinstance(listed, list) else ()
    named = {f"data.folders.{n}": each.get("path") for n, each in several if isinstance(each, Mapping)}
    for setting, folder in {"data.folder": data.get("folder"), **named}.items():
        if isinstance(folder, str) and not Path(place := os.path.expanduser(folder)).is_dir():
            yield f"{setting}: {place} is no folder."


def _at(content: Mapping[str, Any], setting: str) -> Any:
    section, _, name = setting.partition(".")
    inner = content.get(section)
    named = inner.get(name) if isinstance(inner, Mapping) else None
    return os.path.expanduser(named) if isinstance(named, str) else named
