"""Folders of adapter-only weights: what is in them and what they belong to; diffusers is not imported for it.

`adapter.json` says what the weights belong to, `embedder_head.safetensors` has the parameters that were trained as they
are, `pytorch_lora_weights.safetensors` a LoRA on the rest, as diffusers' pipelines write it, and `vae/` often the
autoencoder. `adapted` loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import demo
from ..files.plain_content import object_in

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_PREFIX = "transformer"
FULL_FILE = "embedder_head.safetensors"
FACTS_FILE = "adapter.json"
DEFAULTS_FILE = "generation_defaults.json"
"""Beside a pipeline's `model_index.json`: frames, height, width, steps, guidance_scale that suit it, or some of them,
as those that it was trained at. Adapter-only weights have the same under "defaults" in `FACTS_FILE`."""


class AdapterError(ValueError):
    """An adapter that cannot be loaded; the message says what does not fit, and the fix."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapter-only weights."""
    return (folder / FACTS_FILE).is_file() and not (folder / "model_index.json").is_file()


def read_facts(folder: Path) -> dict[str, Any]:
    """What an adapter belongs to: `base`, `autoencoder` (a hub id, or a folder, seen from that of the adapter), `lora`,
    the config of the transformer, and mostly `base_hash`, that of the transformer of the base (`transformer_files`).

    Raises:
        AdapterError: `adapter.json` cannot be read, or lacks one of them.
    """
    try:
        facts = object_in(folder / FACTS_FILE)
        check_kinds(facts)
        missing = {"base", "autoencoder", "lora", "transformer"} - set(facts)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / FACTS_FILE} cannot be read: {error}") from error
    if missing:
        raise AdapterError(
            f"{folder / FACTS_FILE} lacks {', '.join(sorted(missing))}: it was written by something else."
        )
    return facts


def check_kinds(facts: Mapping[str, Any]) -> None:
    """Raise ValueError for values of `adapter.json` of other kinds than they can have; those not there pass."""
    kinds = {"base": (str, "a text"), "autoencoder": (str, "a text"), "transformer": (dict, "an object")}
    for name, (kind, called) in (kinds | {"lora": (bool, "true or false")}).items():
        if not isinstance(value := facts.get(name), kind | None):
            raise ValueError(f"{name} is {value!r}, and must be {called}")


def is_of_pictures(transformer: Any) -> bool:
    """Whether an adapter is for text to image, from the config of its transformer: that of videos has patches of three
    sides."""
    return isinstance(transformer, dict) and isinstance(transformer.get("patch_size"), int)


def base_location(base: str) -> str:
    """Folder or hub id of a base model; "demo" is the built-in Wan model."""
    return str(demo.path()) if base == demo.WAN else base
