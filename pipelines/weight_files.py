"""The files of a pipeline's transformer, in a folder or of the hub, and a hash of what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WEIGHTS = "diffusion_pytorch_model.safetensors"


def transformer_files(base: str, part: str = "transformer", samples: int = 16) -> str:
    """A hash of what a transformer of a pipeline is, from a folder or the hub: equal wherever its files lie.

    Of each file of weights, the size and `samples` evenly spaced parts of 4 KiB count; the first has the names.
    """
    config = transformer_file(base, "config.json", part)
    stated = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
    digest = hashlib.sha256(json.dumps({k: v for k, v in stated.items() if k[0] != "_"}, sort_keys=True).encode())
    index = transformer_file(base, f"{WEIGHTS}.index.json", part)
    names = [WEIGHTS]
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for path in filter(None, (transformer_file(base, name, part) for name in names)):
        size = path.stat().st_size
        digest.update(f"{size}".encode())
        with open(path, "rb") as file:
            for number in range(samples):
                file.seek(size * number // samples)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def transformer_tensors(base: str, chosen: Callable[[str], bool], part: str = "transformer") -> dict[str, torch.Tensor]:
    """The tensors of a transformer whose names are chosen, without reading others; empty where it has no safetensors.

    Args:
        base: folder or hub id of the pipeline.
        chosen: whether a name is.
        part: name of the transformer in it.
    """
    from safetensors import safe_open

    index = transformer_file(base, f"{WEIGHTS}.index.json", part)
    names = [WEIGHTS]
    if index is not None:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({file for name, file in places.items() if chosen(name)})
    found: dict[str, torch.Tensor] = {}
    for path in (transformer_file(base, name, part) for name in names):
        if path is None:
            return {}
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if chosen(name)}  # noqa: SIM118
    return found


def transformer_file(base: str, name: str, part: str = "transformer") -> Path | None:
    """A file of a transformer, from a folder or the hub; the part is "" where it is alone there."""
    if Path(base).is_dir():
        path = Path(base) / part / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(base, f"{part}/{name}" if part else name))
    except (OSError, ValueError, EntryNotFoundError):
        return None
