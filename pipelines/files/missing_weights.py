"""Whether the folder of a pipeline has all its weights, told before the first of them is read."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import few_of
from .plain_content import object_in

_PARTS = re.compile(r"(transformer|vae|text_encoder|image_encoder)(_\d)?")
_KINDS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".flashpack")
_NAMES = re.compile(r"(diffusion_pytorch_|pytorch_)?model\b")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def missing_weights(location: str) -> str:
    """What a pipeline in a folder lacks of the weights of its parts, in words; "" where it is not known to lack any.

    Args:
        location: of the pipeline; what is no folder here, such as a hub id, is not looked at.
    """
    folder = Path(location)
    try:
        index = object_in(folder / "model_index.json")
    except (OSError, ValueError):
        return ""
    for name, stated in index.items():
        is_part = _PARTS.fullmatch(name) and isinstance(stated, list) and None not in stated
        if is_part and (folder / name / "config.json").is_file() and (lacking := _lacking(folder / name)):
            return lacking
    return ""


def _lacking(part: Path) -> str:
    """The same of one part."""
    files = [file.name for file in part.iterdir() if file.suffix in _KINDS]
    indexes = sorted(part.glob("*.index.json"))
    # Adapters may lie beside weights, which are then known by their names.
    if any(not _SHARD.search(name) and (not indexes or _NAMES.match(name)) for name in files):
        return ""
    told = "" if files or indexes else f"{part} has no weights beside its config.json"
    for index in indexes:
        try:
            shards = sorted(set(object_in(index)["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return ""  # which is for who reads it to say
        absent = [shard for shard in shards if not (part / shard).is_file()]
        if not absent:
            return ""
        told = f"{part} lacks {few_of(absent)}, which {index.name} names"
    return told
