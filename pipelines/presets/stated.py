"""The parts of a preset from what a file or a user says of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...attention.methods.description import described
from ..guidance_cache.settings import GuidanceCache
from ..loras.files import TARGETS, LoraFile
from ..nearest_name import nearest
from .errors import PresetError
from .levers import Compile, settings_of


def attention_of(stated: Any, folder: Path | None) -> dict[str, Any]:
    """The fields of a preset that `attention` of a file holds: a method by its name, or by names and values.

    Args:
        stated: see above; None for none.
        folder: that relative files are in.
    """
    if stated is None:
        return {}
    stated = {"method": stated} if isinstance(stated, str) else stated
    if isinstance(stated, Mapping) and stated.get("method") in ("dense", "none"):
        fix = "Leave attention out: a preset without it is dense."
        raise PresetError("attention", "it is for sparse attention", fix, stated["method"])
    known = ("method", "settings", "schedule", "backend", "precision", "adapters")
    check_names("attention", stated, known, "the name of a method, or")
    if "method" not in stated:
        raise PresetError("attention", "it has no method", f"It can have {', '.join(known)}.")
    for name in ("settings", "schedule"):
        settings_of(f"attention.{name}", stated.get(name))
    try:
        method = described({name: stated.get(name) for name in ("method", "settings", "schedule")})
    except (ValueError, TypeError) as error:
        raise PresetError("attention", str(error).rstrip(".")) from error
    places = several("attention.adapters", stated.get("adapters"))
    adapters = tuple(place_of("attention.adapters", place, folder) for place in places)
    return {
        "method": method,
        "backend": stated.get("backend") or "auto",
        "precision": stated.get("precision"),
        "sla": adapters,
    }


def part_of(name: str, kind: type, stated: Any) -> Any:
    """A part of a preset from a mapping, or from its first field alone."""
    known = [f.name for f in fields(kind)]
    stated = {known[0]: stated} if isinstance(stated, str) else stated
    check_names(name, stated, known, f"its {known[0]} alone, or")
    if known[0] not in stated:
        raise PresetError(name, f"it has no {known[0]}", f"It can have {', '.join(known)}.")
    return kind(**stated)


def guidance_cache_of(given: Any) -> GuidanceCache | None:
    """What a preset says of it: settings by name, or `every` alone."""
    if given is None or isinstance(given, GuidanceCache):
        return given
    settings = given if isinstance(given, Mapping) else {"every": given}
    check_names("guidance_cache", settings, [f.name for f in fields(GuidanceCache)])
    try:
        return GuidanceCache(**settings)
    except ValueError as error:
        raise PresetError("guidance_cache", str(error).partition(".")[2].rstrip(".")) from error


def compile_of(given: Any) -> Compile | None:
    """What a preset says of it: true, its mode alone, or settings by name."""
    if given is None or given is False or isinstance(given, Compile):
        return given or None
    settings = {"mode": given} if isinstance(given, str) else {} if given is True else given
    check_names("compile", settings, [f.name for f in fields(Compile)], "true, false, a mode, or")
    return Compile(**settings)


def lora_of(stated: Any, folder: Path | None) -> LoraFile:
    """A LoRA of a file: its path alone, or names and values."""
    stated = {"file": stated} if isinstance(stated, str) else stated
    check_names("loras", stated, ("file", "weight", "target"), "a file, or")
    if not isinstance(stated.get("file"), str):
        raise PresetError("loras", "each needs a file", value=repr(stated))
    weight = stated.get("weight")
    place = place_of("loras", stated["file"], folder)
    return LoraFile(Path(place), 1.0 if weight is None else weight, stated.get("target"))


def lora_file(given: Any) -> LoraFile:
    """A LoRA as it was given from Python, checked."""
    if not isinstance(given, str | Path | LoraFile):
        raise PresetError("loras", "each must be a file or a LoraFile", value=repr(given))
    lora = replace(given, path=Path(given.path)) if isinstance(given, LoraFile) else LoraFile(Path(given))
    if isinstance(lora.weight, bool) or not isinstance(lora.weight, int | float) or not math.isfinite(lora.weight):
        raise PresetError("loras.weight", "it must be a finite number", value=repr(lora.weight))
    if lora.target is not None and lora.target not in TARGETS:
        raise PresetError("loras.target", f"it must be one of {', '.join(TARGETS)}", value=repr(lora.target))
    return replace(lora, weight=float(lora.weight))


def several(lever: str, stated: Any, single: Any = str | Mapping) -> list[Any]:
    """What stands in a list, where one alone may stand for itself.

    Args:
        lever: that it is of.
        stated: a list, one of its entries, or None for none.
        single: kinds of an entry.

    Raises:
        PresetError: another kind.
    """
    if stated is None:
        return []
    if isinstance(stated, single):
        return [stated]
    if not isinstance(stated, list | tuple):
        raise PresetError(lever, "it must be a file or a list of them", value=repr(stated))
    return list(stated)


def place_of(lever: str, place: Any, folder: Path | None) -> str:
    """A file that a preset names, which may be relative to its folder."""
    if not isinstance(place, str) or not place.strip():
        raise PresetError(lever, "a file must be a text that names it", value=repr(place))
    path = Path(place).expanduser()
    if path.is_absolute() or folder is None:
        return str(path)
    return str(folder / path) if ".." not in path.parts else str((folder / path).resolve())


def check_names(where: str, stated: Any, known: Iterable[str], other: str = "") -> None:
    """Raise for what is no mapping, and for a name in it that is not known.

    Args:
        other: what may stand in its place, in words.
    """
    known = list(known)
    if not isinstance(stated, Mapping):
        wanted = f"it must be {other} hold" if other else "it must hold"
        raise PresetError(where, f"{wanted} names and values ({', '.join(known)})", value=repr(stated))
    for name in stated:
        if name not in known:
            raise PresetError(where, f"there is no {name}{nearest(str(name), known)}")
