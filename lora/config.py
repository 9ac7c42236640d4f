"""Settings from YAML into frozen dataclasses: every fault is found and named before anything loads."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..pipelines.files.plain_content import content_of

T = TypeVar("T")


class ConfigError(ValueError):
    """Settings that cannot be used; one line for each fault, with the value, the bound and the fix."""


def setting(
    default: Any = MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    free: bool = False,
    place: bool = False,
) -> Any:
    """A field of a `Settings` class.

    Args:
        default: its default; without one the field must be given.
        low, high: bounds that the value may touch; of a list, bounds of each entry.
        above, below: bounds that it may not touch.
        free: a run may be resumed with another value.
        place: it may name a file or folder here, whose "~" is the home of the user; no shell sees what is in YAML.
    """
    metadata = {"low": low, "high": high, "above": above, "below": below, "free": free, "place": place}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all settings. A subclass is a frozen dataclass; what its fields must satisfy together goes in `check`.

    Raises:
        ConfigError: a value outside its bounds, or what `check` reports.
    """

    def __post_init__(self) -> None:
        faults = [fault for field in fields(self) for fault in _bounds(field, getattr(self, field.name))]
        faults = faults or list(self.check())
        if faults:
            raise ConfigError("\n".join(faults))

    def check(self) -> Iterable[str]:
        """Faults of the fields together, each beginning with the field's name."""
        return ()

    def free_here(self) -> Iterable[str]:
        """Fields that a run may be resumed with another value of because of what the others are."""
        return ()


def load(cls: type[T], file: str | Path, overrides: Iterable[str] = ()) -> T:
    """The settings in a YAML file.

    Args:
        cls: a subclass of `Settings`.
        file: YAML, a mapping at the top.
        overrides: "a.b=value" or "a.0.b=value", the value in YAML.

    Raises:
        ConfigError: no such file, no YAML, a name that stands twice, or any fault in it; all faults in one message.
    """
    return build(cls, read(file, overrides), str(file))


def read(file: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a YAML file holds, with overrides, not checked yet. Raises as `load` does."""
    file = Path(file)
    try:
        content = content_of(file.read_text(encoding="utf-8"), False)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds {_kind(content)}, but must be a mapping of settings.")
    for override in overrides:
        _override(content, override)
    return content


def build(cls: type[T], content: Mapping[str, Any], source: str = "", more: Sequence[str] = ()) -> T:
    """The settings in a mapping. Raises as `load` does; `more` are faults of it that were found already."""
    faults: list[str] = []
    made = _build(cls, content, "", faults)
    faults.extend(more)
    if faults:
        head = f"{source}: " if source else ""
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise ConfigError(f"{head}{len(faults)} fault{'s' if len(faults) > 1 else ''} in the settings:\n{lines}")
    return made


def as_yaml(config: Settings) -> str:
    """The settings, defaults included, as YAML that `load` reads."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def with_overrides(config: T, overrides: Iterable[str]) -> T:
    """The settings with others of their values, as in `load`.

    Raises:
        ConfigError: they cannot have them.
    """
    content = _plain(dataclasses.asdict(config))  # type: ignore[call-overload]  # every settings class is one
    for override in overrides:
        _override(content, override)
    return build(type(config), content)


def differences(old: Settings, new: Settings) -> list[str]:
    """One line for each setting that differs and that a resumed run may not change."""
    before, after = flat(old), flat(new)
    changed = [name for name in {**before, **after} if _shown(before, name) != _shown(after, name)]
    free = [set(flat(config)) - {name for name, _ in _flat(config)} for config in (old, new)]
    # What is free in one of the two only is so because of its other settings: where one of them is told, it is the one.
    always = [name for name in changed if name not in free[0] | free[1]]
    told = always or [name for name in changed if name not in free[0] & free[1]]
    return [f"{name}: {_shown(before, name)} then, {_shown(after, name)} now" for name in told]


def flat(config: Settings) -> dict[str, Any]:
    """Settings as "a.b" -> value, for trackers."""
    return dict(_flat(config, everything=True))


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?', or the known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}."


def broken_character(text: str) -> str | None:
    """What to say of half a character in a text, such as "\\ud83d" in JSON, which nothing can encode; or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        return f"has {half}, which is half of a character: write the character itself, in UTF-8."
    return None


# -- parsing -----------------------------------------------------------------------------------------------------------


def _build(cls: type, content: Any, path: str, faults: list[str], base: Any = None) -> Any:
    """An instance of `cls`; what `content` does not have comes from `base`, then from the defaults."""
    if not isinstance(content, Mapping):
        faults.append(f"{path or 'the settings'} is {_kind(content)}, but must be a mapping.")
        return None
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}
    before = len(faults)
    for name in content:
        if name not in known:
            faults.append(f"{_join(path, name)} is not known: {nearest(str(name), known)}")
    values = {}
    for name, field in known.items():
        default = getattr(base, name) if base is not None else _default(field)
        if name in content:
            value = _convert(content[name], hints[name], _join(path, name), faults, default)
            values[name] = os.path.expanduser(value) if field.metadata.get("place") and value else value
        elif base is not None:
            values[name] = default
        elif field.default is MISSING and field.default_factory is MISSING:
            faults.append(f"{_join(path, name)} is missing.")
    if len(faults) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        faults.extend(_join(path, line) for line in str(error).splitlines())
        return None


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _convert(value: Any, hint: Any, path: str, faults: list[str], default: Any = None) -> Any:
    """`value` as the type `hint`; a fault when it cannot be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), path, faults, default)
    if origin is typing.Literal:
        # YAML 1.1 reads a bare `no` as false.
        if value is False and "no" in args:
            value = "no"
        if value in args and not isinstance(value, bool):
            return value
        faults.append(f"{path} is {value!r}, but must be one of {', '.join(map(str, args))}.")
        return None
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            faults.append(f"{path} is {_kind(value)}, but must be a list.")
            return None
        if args[-1] is not Ellipsis and len(args) != len(value):
            faults.append(f"{path} has {len(value)} entries, but must have {len(args)}.")
            return None
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(
            _convert(v, k, _join(path, str(i)), faults) for i, (v, k) in enumerate(zip(value, kinds, strict=True))
        )
    if isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value, path, faults, default if isinstance(default, hint) else None)
    return _scalar(value, hint, path, faults)


def _scalar(value: Any, hint: type, path: str, faults: list[str]) -> Any:
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4, without a point, as text.
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        broken = broken_character(value) if isinstance(value, str) else None
        if broken is not None:
            faults.append(f"{path} {broken}")
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    faults.append(f"{path} is {_kind(value)}, but must be {wanted}.")
    return None


def _bounds(field: dataclasses.Field, value: Any) -> Iterator[str]:
    data = field.metadata
    entries = value if isinstance(value, tuple) else (value,)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, (int, float)):
            continue
        if not math.isfinite(entry):
            yield f"{field.name} is {entry}: it must be finite."
        for bound, wrong, words in (
            ("low", lambda x, b: x < b, "at least"),
            ("above", lambda x, b: x <= b, "above"),
            ("high", lambda x, b: x > b, "at most"),
            ("below", lambda x, b: x >= b, "below"),
        ):
            limit = data.get(bound)
            if limit is not None and wrong(entry, limit):
                yield f"{field.name} is {entry}: it must be {words} {limit}."


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f'--set {override}: write it as "a.b=value".')
    try:
        value = content_of(text, False)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--set {override}: the value is no YAML: {error}") from error
    place: Any = content
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise ConfigError(f"--set {override}: {'.'.join(keys[:depth])} has the entries 0 to {len(place) - 1}.")
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
            if not last and place.get(key) is None:
                place[key] = {}
        else:
            raise ConfigError(f"--set {override}: {'.'.join(keys[:depth])} is {_kind(place)} and has no {key!r}.")
        if last:
            place[index] = value
        else:
            place = place[index]


# -- printing ----------------------------------------------------------------------------------------------------------


def _flat(value: Any, path: str = "", everything: bool = False) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value) and not isinstance(value, type):
        free = set(value.free_here())  # type: ignore[attr-defined]  # every settings class has it
        for field in fields(value):
            if everything or not (field.metadata.get("free") or field.name in free):
                yield from _flat(getattr(value, field.name), _join(path, field.name), everything)
    elif isinstance(value, tuple) and any(is_dataclass(entry) for entry in value):
        for number, entry in enumerate(value):
            yield from _flat(entry, _join(path, str(number)), everything)
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else str(name)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "empty", bool: "true or false"}
    return names.get(type(value)) or (f'the text "{value}"' if isinstance(value, str) else f"the number {value}")
