"""Presets as YAML and JSON files, and those that come with the package."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ...attention.methods import METHODS, Method
from ...demo import MODELS
from ..files.locations import is_hub_id, is_model, is_single_file
from ..files.plain_content import content_of
from ..files.whole_files import write_bytes
from ..nearest_name import nearest
from .errors import PresetError
from .preset import OWN, Preset

SHIPPED = Path(__file__).parent / "shipped"
SUFFIXES = (".yaml", ".yml", ".json")
TUNED = "preset.yaml"
"""In the folder of a `tune`."""


def shipped_presets() -> dict[str, Path]:
    """The presets of the package: name -> file."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def load_preset(place: str | Path) -> Preset:
    """A preset from a file, or one of the package by its name.

    Args:
        place: a .yaml, .yml or .json file, a folder with a `TUNED` in it, or a name of `shipped_presets`.

    Raises:
        PresetError: there is no such file or name, it cannot be read, or something in it is wrong.
    """
    shipped = shipped_presets()
    file = shipped.get(str(place), Path(place).expanduser())
    if os.path.isdir(file):
        if not (file / TUNED).is_file():
            problem = f"{file} is a folder, and there is no {TUNED} in it"
            raise PresetError("", problem, "Give a file, or the folder in which `vidaccel tune` found one.")
        file = file / TUNED
    if not os.path.isfile(file):  # of a name that is too long it is false, where Path raises
        problem = f"there is no preset {place}{nearest(str(place), shipped)}"
        raise PresetError("", problem, f"Give a name of `vidaccel presets`, or a file ({', '.join(SUFFIXES)}).")
    try:
        text = file.read_text(encoding="utf-8")
        content: Any = content_of(text, file.suffix == ".json")
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise PresetError("", f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise PresetError("", f"{file} holds no names and values", "See docs/presets.md for what a preset has.")
    try:
        return Preset.from_dict(content, file.parent)
    except PresetError as error:
        raise PresetError(error.lever, f"{error.problem} (in {file})", error.fix, error.value) from error


def save_preset(preset: Preset, place: str | Path) -> Path:
    """Write a preset; an existing file is replaced.

    Args:
        preset: to write.
        place: a .yaml, .yml or .json file.

    Raises:
        PresetError: another suffix, or a folder that is not there; a method that a file cannot name.
        NotWritten: it cannot be written; what was there is untouched.
    """
    file = Path(place).expanduser()
    if file.suffix not in SUFFIXES:
        raise PresetError("", f"{file} has the suffix {file.suffix!r}", f"Give {', '.join(SUFFIXES)}.")
    if not file.parent.is_dir():
        raise PresetError("", f"there is no folder {file.parent}", "Make it first.")
    _check_named(preset.method)
    content = absolute(preset).to_dict()
    if file.suffix == ".json":
        text = json.dumps(content, indent=2) + "\n"
    else:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return write_bytes(text.encode(), file)


def _check_named(method: Method | None) -> None:
    """Raise a PresetError for a method that would be read from a file as another one, or not at all."""
    if method is None:
        return
    cls, other = type(method), METHODS.get(method.name)
    if other is cls:
        return
    problem = f"a file names a method, and {method.name!r} is {other.__name__ if other else 'not in vidaccel.METHODS'}"
    fix = f'vidaccel.METHODS["{"my-method" if other else method.name}"] = {cls.__name__}.'
    fix = f"{'Give it a name of its own, and register' if other else 'Register'} it here and where it is read: {fix}"
    raise PresetError("method", problem, fix, cls.__name__)


def absolute(preset: Preset) -> Preset:
    """The preset with the whole paths of its files, which a reader would take for files beside its own."""
    return preset.replace(
        model=whole_model(preset.model),
        base=whole_model(preset.base),
        sla=tuple(str(Path(place).resolve()) for place in preset.sla),
        guidance_free=tuple(place if place == OWN else str(Path(place).resolve()) for place in preset.guidance_free),
        loras=tuple(replace(lora, path=Path(lora.path).resolve()) for lora in preset.loras),
        decoder=_whole(preset.decoder),
    )


def whole_model(name: str) -> str:
    """A model by a name that holds in all folders: the whole path of what is there, other names as they are."""
    if not name or name in MODELS or not is_model(name):
        return name
    return str(Path(name).expanduser().resolve())


def _whole(decoder: str | None) -> str | None:
    """The whole path of a decoder, where it is one."""
    if decoder is None or decoder == OWN or (is_hub_id(decoder) and not is_single_file(decoder)):
        return decoder
    return str(Path(decoder).expanduser().resolve())
