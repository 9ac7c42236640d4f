"""Model folders: reading a config, one model or a part of one, and writing a pipeline whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pipelines.locations import is_hub_id
from ..checkpoint import replaced
from ..config import ConfigError

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def located(location: str, setting: str, built_in: str, part: str = "") -> str:
    """Where a model is: a folder or hub id as it is, and the folder of the built-in one.

    Args:
        location: as the user wrote it.
        setting: that names it, for the message.
        built_in: name of the built-in pipeline that has such a model.
        part: of that pipeline.

    Raises:
        ConfigError: neither of the three.
    """
    from ... import demo

    if location == built_in:
        return str(demo.path(built_in) / part)
    if Path(location).is_dir() or is_hub_id(location):
        return location
    raise ConfigError(
        f"{setting}: {location} is no folder here, no hub id of the form owner/name, and not the built-in "
        f'"{built_in}": correct the path, or make the model first.'
    )


def read_config(cls: Any, location: str, subfolder: str | None = None) -> dict:
    """The config of a model of diffusers.

    Raises:
        ConfigError: there is none that can be read.
    """
    try:
        return dict(cls.load_config(location, subfolder=subfolder))
    except (OSError, ValueError) as error:
        where = f"{location}/{subfolder}" if subfolder else location
        raise ConfigError(f"model: {where} has no readable config.json of a {cls.__name__}: {error}") from error


def load_autoencoder(cls: Any, location: str, setting: str, **options: Any) -> Any:
    """An autoencoder of diffusers.

    Args:
        cls: its class.
        location: folder or hub id.
        setting: that names it, for the message.
        options: of `from_pretrained`.

    Raises:
        ConfigError: it cannot be loaded.
    """
    try:
        return cls.from_pretrained(location, **options)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights of other shapes than the config says
        raise ConfigError(f"{setting}: {location} is no autoencoder that {cls.__name__} can load: {error}") from error


def load_part(cls: Any, base: str, name: str, dtype: torch.dtype) -> Any:
    """One module of the transformer of a pipeline, on the CPU, without reading the rest, which may be 28 GB.

    Args:
        cls: of the transformer.
        base: folder or hub id of the pipeline.
        name: of the module in the transformer.
        dtype: of its weights.
    """
    tensors = _tensors(base, f"{name}.")
    if not tensors:  # not in safetensors
        return cls.from_pretrained(base, subfolder="transformer", dtype=dtype).get_submodule(name)
    from accelerate import init_empty_weights

    with init_empty_weights():
        part = cls.from_config(cls.load_config(base, subfolder="transformer")).get_submodule(name)
    own = {key.removeprefix(f"{name}."): value.to(dtype) for key, value in tensors.items()}
    part.load_state_dict(own, assign=True)
    return part


def _tensors(base: str, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of the transformer whose names begin so; empty where it has no safetensors files."""
    from safetensors import safe_open

    index = _file(base, f"{_WEIGHTS}.index.json")
    if index is not None:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [_file(base, name) for name in sorted({v for k, v in places.items() if k.startswith(prefix)})]
    else:
        files = [_file(base, _WEIGHTS)]
    found: dict[str, torch.Tensor] = {}
    for path in files:
        if path is None:
            return {}
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    return found


def transformer_files(base: str, part: str = "transformer", samples: int = 16) -> str:
    """A hash of what a transformer of a pipeline is, from a folder or the hub: equal wherever its files lie.

    Of each file of weights, the size and `samples` evenly spaced parts of 4 KiB count; the first has the names.
    """
    config = _file(base, "config.json", part)
    stated = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
    digest = hashlib.sha256(json.dumps({k: v for k, v in stated.items() if k[0] != "_"}, sort_keys=True).encode())
    index = _file(base, f"{_WEIGHTS}.index.json", part)
    names = [_WEIGHTS]
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for path in filter(None, (_file(base, name, part) for name in names)):
        size = path.stat().st_size
        digest.update(f"{size}".encode())
        with open(path, "rb") as file:
            for number in range(samples):
                file.seek(size * number // samples)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def _file(base: str, name: str, part: str = "transformer") -> Path | None:
    """A file of a transformer, from a folder or the hub."""
    if Path(base).is_dir():
        path = Path(base) / part / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(base, f"{part}/{name}"))
    except (OSError, ValueError, EntryNotFoundError):
        return None


def to_cpu(pipe: Any) -> None:
    """Move the models of a pipeline to the CPU, where it could not run in half precision, but keeps."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to("cpu")


def write_model(model: Any, folder: Path) -> None:
    """Write a model or a pipeline; what was in the folder is replaced once all is written.

    Raises:
        OSError: it cannot be written.
    """
    with replaced(folder) as draft:
        model.save_pretrained(draft, safe_serialization=True)
        forget_paths(draft)


def forget_paths(folder: Path) -> None:
    """Remove where the parts were loaded from, which diffusers and transformers write into their configs."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
