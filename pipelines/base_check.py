"""Whether a transformer in memory is the one that an adapter was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from .files.weight_files import HubError, stated_config, transformer_files


class Adapter(Protocol):
    """What must be known of an adapter: its file, and name, hash and part of the transformer that it was trained on."""

    @property
    def path(self) -> Path: ...
    @property
    def base(self) -> str: ...
    @property
    def base_hash(self) -> str: ...
    @property
    def part(self) -> str: ...


def check_base(transformer: Any, part: str, adapter: Adapter, base: str | Path | None, error: type[ValueError]) -> None:
    """Raise unless a transformer is from the files that an adapter was trained on.

    Args:
        transformer: as diffusers loaded it.
        part: its name in the pipeline.
        adapter: for it.
        base: folder or hub id of the pipeline that it is from; None for where it says that it is from.
        error: what is raised.
    """
    stated = str(base or transformer.config.get("_name_or_path") or "")
    try:
        place = place_of(transformer, part, base)
    except HubError as fault:
        raise error(f"whether {adapter.path.name} is for this {part} cannot be told: {fault}.") from fault
    if place is None:
        raise error(
            f"whether {adapter.path.name} is for this {part} cannot be told: its files are not in "
            f"{stated or 'any folder that it knows'}. Load it with from_pretrained, or give that folder with base=."
        )
    if _changed(transformer, *place) or transformer_files(*place) != adapter.base_hash:
        raise error(
            f"{adapter.path.name} was trained on {adapter.base} ({adapter.part}), and this {part} has other weights: "
            "give the model that it was trained on (its folder or name with base= if this is a copy of it), or an "
            "adapter of this one."
        )


def place_of(transformer: Any, part: str, base: str | Path | None = None) -> tuple[str, str] | None:
    """Where a transformer is from: folder or hub id of the pipeline, and the part of it; None where that is not known.

    Args:
        transformer: as diffusers loaded it.
        part: its name in the pipeline.
        base: where it is from; None for where it says that it is from.

    Raises:
        HubError: the hub cannot be asked.
    """
    stated = str(base or transformer.config.get("_name_or_path") or "")
    # diffusers notes the folder of the pipeline, or that of its part; and some transformers are alone in theirs.
    places = [(stated, part), (stated, "")] if stated else []
    return next((place for place in places if stated_config(*place) is not None), None)


def _changed(transformer: Any, place: str, part: str) -> bool:
    """Whether a transformer is of another shape than its files, as one moved to another autoencoder is."""
    wanted = stated_config(place, part) or {}
    own = json.loads(json.dumps({key: value for key, value in transformer.config.items() if key[0] != "_"}))
    return any(own.get(key) != value for key, value in wanted.items() if key in own)
