"""Whether a transformer in memory is the one that an adapter was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from ..weight_files import transformer_file, transformer_files
from .adapter_file import GuidanceFreeError


class Trained(Protocol):
    """A file that was trained on one transformer; see `GuidanceFreeAdapter`."""

    @property
    def path(self) -> Path: ...
    @property
    def base(self) -> str: ...
    @property
    def base_hash(self) -> str: ...
    @property
    def part(self) -> str: ...


def check_base(transformer: Any, part: str, adapter: Trained, base: str | Path | None = None) -> None:
    """Raise GuidanceFreeError unless a transformer is from the files that an adapter was trained on.

    Args:
        transformer: as diffusers loaded it.
        part: its name in the pipeline.
        adapter: for it.
        base: folder or hub id of the pipeline that it is from; None for where it says that it is from.
    """
    stated = str(base or transformer.config.get("_name_or_path") or "")
    place = next((p for p in _places(stated, part) if transformer_file(p, "config.json", part)), None)
    if place is None:
        raise GuidanceFreeError(
            f"whether {adapter.path.name} is for this {part} cannot be told: its files are not in "
            f"{stated or 'any folder that it knows'}. Load it with from_pretrained, or give that folder with base=."
        )
    if _changed(transformer, place, part) or transformer_files(place, part) != adapter.base_hash:
        raise GuidanceFreeError(
            f"{adapter.path.name} was trained on {adapter.base} ({adapter.part}), and this {part} has other weights: "
            "give the model that it was trained on, or an adapter of this one."
        )


def _places(stated: str, part: str) -> list[str]:
    """Where the folder of the pipeline may be: diffusers notes that of the pipeline or that of its part."""
    if not stated:
        return []
    path = Path(stated)
    return [stated, str(path.parent)] if path.name == part else [stated]


def _changed(transformer: Any, place: str, part: str) -> bool:
    """Whether a transformer is of another shape than its files, as one moved to another autoencoder is."""
    file = transformer_file(place, "config.json", part)
    wanted = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    own = json.loads(json.dumps(dict(transformer.config)))
    return any(own.get(key) != value for key, value in wanted.items() if key[0] != "_" and key in own)
