"""What a transformer states that it was trained for: methods of sparse attention, each with its settings.

It is below `KEY` in its `config.json`, which diffusers takes along wherever a transformer goes: into memory, through
`save_pretrained` and from the hub. Older folders have it in a file beside it, which diffusers leaves behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from .base_check import place_of
from .files.json_files import stated, write_json

KEY = "_trained_for"


class Origin:
    """A transformer of a pipeline and where it is from, which is looked up once.

    Args:
        name, transformer: of the pipeline.
        base: folder or hub id of the pipeline, where the transformer does not know.
    """

    def __init__(self, name: str, transformer: Any, base: str | Path | None = None) -> None:
        self.name, self.transformer, self.base = name, transformer, base
        self._found: dict[str, tuple[Any, str] | None] = {}

    @cached_property
    def place(self) -> tuple[str, str] | None:
        """See `place_of`."""
        return place_of(self.transformer, self.name, self.base)

    @property
    def told(self) -> Mapping[str, Any]:
        """Method -> settings, as the transformer itself says without a look at its files."""
        return self.transformer.config.get(KEY) or {}

    def settings(self, method: str, older: str, error: type[ValueError]) -> tuple[Any, str] | None:
        """The settings that it was trained with for a method, and where they are stated; None for no such training.

        Args:
            method: its name. older: the file of it in older folders. error: for one that cannot be read.
        """
        if self.told:
            return (self.told[method], f"the config of {self.name}") if method in self.told else None
        if method not in self._found:
            self._found[method] = None if self.place is None else read(*self.place, method, older, error)
        return self._found[method]


def origins_of(transformers: Mapping[str, tuple[Any, Any]], base: str | Path | None = None) -> dict[str, Origin]:
    """Those of the transformers of a pipeline, as `find_transformers` gives them."""
    return {name: Origin(name, transformer, base) for name, (transformer, _) in transformers.items()}


def read(base: str, part: str, method: str, older: str, error: type[ValueError]) -> tuple[Any, str] | None:
    """The same of a transformer that is not loaded.

    Args:
        base: folder or hub id of the pipeline. part: name of the transformer in it, "" where it is alone.
        method, older, error: see `Origin.settings`.
    """
    config = stated(base, part, "config.json", error)
    told = {} if config is None else config[0].get(KEY) or {}
    if config is not None and told:
        return (told[method], str(config[1])) if method in told else None
    found = stated(base, part, older, error)
    return None if found is None else (found[0], str(found[1]))


def write(folder: Path, method: str, settings: Mapping[str, Any]) -> Path:
    """State in the folder of a transformer what it was trained for."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return write_json(path, {**config, KEY: {method: settings}})


class Stated:
    """A transformer that states it while what it learned is part of it, so that it is saved with that.

    Args:
        transformer: that states it; one that does so already is left as it is.
        method, settings: what it was trained for.
    """

    def __init__(self, transformer: Any, method: str, settings: Mapping[str, Any]) -> None:
        # An attribute, of which a deep copy has its own: taking it back from a copy must leave the original's.
        self._transformer = None if transformer.config.get(KEY) else transformer
        if self._transformer is not None:
            transformer.register_to_config(**{KEY: {method: settings}})

    def remove(self) -> None:
        """Take it back. A second call does nothing."""
        from diffusers.configuration_utils import FrozenDict

        transformer, self._transformer = self._transformer, None
        if transformer is not None:
            transformer._internal_dict = FrozenDict({k: v for k, v in transformer.config.items() if k != KEY})
