"""Whether a transformer in memory is the one that an adapter was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..weight_files import stated_config, transformer_files
from .adapter_file import GuidanceFreeAdapter, GuidanceFreeError


def check_base(transformer: Any, part: str, adapter: GuidanceFreeAdapter, base: str | Path | None = None) -> None:
    """Raise GuidanceFreeError unless a transformer is from the files that an adapter was trained on.

    Args:
        transformer: as diffusers loaded it.
        part: its name in the pipeline.
        adapter: for it.
        base: folder or hub id of the pipeline that it is from; None for where it says that it is from.
    """
    stated = str(base or transformer.config.get("_name_or_path") or "")
    configs = ((place, stated_config(place, part)) for place in _places(stated, part))
    place, config = next(((place, config) for place, config in configs if config is not None), (None, None))
    if place is None or config is None:
        raise GuidanceFreeError(
            f"whether {adapter.path.name} is for this {part} cannot be told: its files are not in "
            f"{stated or 'any folder that it knows'}. Load it with from_pretrained, or give that folder with base=."
        )
    if _changed(transformer, config) or transformer_files(place, part) != adapter.base_hash:
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


def _changed(transformer: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether a transformer is of another shape than its files, as one moved to another autoencoder is."""
    own = json.loads(json.dumps(dict(transformer.config)))
    return any(own.get(key) != value for key, value in wanted.items() if key in own)
