"""Keeping the break-evens of this machine, and the limit that follows for a model that is known by its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.break_even import BreakEven, Key, Limit, fixed, limit
from ...pipelines.default_method import DEFAULT_METHOD
from ..outputs import check_writable

if TYPE_CHECKING:
    import torch

    from ..models.facts import ModelFacts


CACHE = "HF_ASSETS_CACHE"
"""The environment variable that says where break-evens are kept, see `pipelines.break_even.folder`."""


def check_cache(key: Key) -> None:
    """Raise BadInput unless a break-even can be kept; it names the variable by which another folder is chosen."""
    from huggingface_hub import constants

    check_writable(CACHE, key.file, value=constants.HF_ASSETS_CACHE)


def store(key: Key, found: BreakEven) -> Path:
    """Keep what was measured, in place of what was there."""
    from ...pipelines.files.whole_files import write_bytes

    content: dict[str, Any] = {"key": vars(key), "break_even": found.to_dict()}
    key.file.parent.mkdir(parents=True, exist_ok=True)
    return write_bytes(json.dumps(content, indent=1).encode() + b"\n", key.file)


def limit_of(facts: ModelFacts, device: torch.device, dtype: torch.dtype, method: str = DEFAULT_METHOD) -> Limit:
    """`limit` for a model on a device; the fixed default where its settings do not tell its heads."""
    try:
        heads = facts.row.heads(facts.transformer)
    except KeyError:
        return fixed()
    return limit(Key.here(*heads, device, dtype, method), facts.name)
