"""Whether the folder of a pipeline has all its weights, in files that are whole: told before the first is read."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from ..errors import few_of, first_line
from .plain_content import object_in

_PARTS = re.compile(r"(transformer|vae|text_encoder|image_encoder)(_\d)?")
_KINDS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".flashpack")
_NAMES = re.compile(r"(diffusion_pytorch_|pytorch_)?model\b")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def missing_weights(location: str) -> str:
    """What a pipeline in a folder lacks of the weights of its parts, or which of their files is cut off, in words; ""
    where it is not known to lack any.

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
        part = folder / name
        if is_part and (part / "config.json").is_file() and (told := _lacking(part) or _broken(part)):
            return told
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


def _broken(part: Path) -> str:
    """Which of the files of a part's weights is none, by its header and length, in words; "" where all are."""
    for file in sorted(part.iterdir()):
        if _NAMES.match(file.name) and (why := _fault(file)):
            return f"{file} is cut off, or no file of weights: {why}"
    return ""


def _fault(file: Path) -> str:
    """What is wrong with a file of weights; "" where nothing is known to be, as of kinds that are not looked at."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return ""
        if file.suffix == ".bin":
            with file.open("rb") as opened:
                begins = opened.read(2)
            # Since torch 1.6 these are archives, whose directory is at their end; older ones are pickles.
            if begins == b"\x80\x02" or zipfile.is_zipfile(file):
                return ""
            return "torch cannot open it"
    except (OSError, SafetensorError) as error:
        return first_line(error).rstrip(".")
    return ""
