"""What YAML and JSON hold, in plain kinds: a name that stands twice is refused, of which YAML takes the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def content_of(text: str, is_json: bool) -> Any:
    """What a text holds.

    Args:
        text: such as that of a file; a byte order mark at its start, of editors on Windows, is none of it.
        is_json: whether it is JSON, otherwise YAML.

    Raises:
        ValueError, yaml.YAMLError: it is none, a name stands twice in one mapping, or it is nested too deeply.
    """
    try:
        if is_json:
            return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_once)
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_of(text: str | bytes) -> Any:
    """What a text of JSON holds, whoever wrote it: of a name that stands twice the last counts, as for all readers.

    Raises:
        ValueError: it is no JSON, is not in UTF-8, or is nested too deeply.
    """
    try:
        return json.loads((text.decode() if isinstance(text, bytes) else text).removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def object_in(file: Path) -> dict[str, Any]:
    """The names and values in a JSON file, such as a config.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON, or none with names and values.
    """
    content = json_of(file.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"it must be an object, and is a {type(content).__name__}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := _twice([key for key, _ in pairs]):
        raise ValueError(f"{twice[0]} is there twice")
    return dict(pairs)


def _twice(keys: list[Any]) -> list[Any]:
    return [key for number, key in enumerate(keys) if key in keys[:number]]


class _Loader(yaml.SafeLoader):
    """YAML in plain kinds. Names are compared as they are written: what `<<` brings in is there to be replaced."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        if twice := _twice(keys):
            mark = next(key.start_mark for key, name in zip(written[::-1], keys[::-1], strict=True) if name == twice[0])
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is there twice", mark)
        return node
