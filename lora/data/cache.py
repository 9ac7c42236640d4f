"""A cache of tensors on disk, by what they follow from. Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ...pipelines.files.plain_content import json_of
from ...pipelines.files.weight_files import transformer_file
from ..checkpoints.checkpoint import CheckpointError
from ..checkpoints.written import remedy, save_tensors
from ..config import ConfigError

_CHECKSUM = "crc32"
"""Its name among the metadata of a file."""


def check_cache(location: str | None) -> None:
    """See that `data.cache`, where it is set, is a folder or can become one, before long work that it is for.

    Raises:
        ConfigError: a file is in its place.
    """
    if location is None:
        return
    folder = Path(location).expanduser()
    for place in (folder, *folder.parents):
        try:
            if place.is_dir():
                return
            if place.exists():
                raise ConfigError(f"data.cache: {folder} cannot be a folder, because {place} is a file: name another.")
        except OSError as error:
            raise ConfigError(f"data.cache: {folder} cannot be looked into: {error}.") from error


def not_kept(folder: Path, error: Exception) -> CheckpointError:
    """What to raise where a file of a cache cannot be written."""
    why = str(error).removesuffix(".")
    return CheckpointError(
        f"the cache {folder} cannot be written: {why}. {remedy(error)}, or choose another data.cache; what is "
        "there is used again."
    )


class TensorCache:
    """Named tensors in safetensors files below a folder, each with a checksum of what is in it.

    Args:
        folder: made when the first tensor comes.
        half: "float16" or "bfloat16", in which numbers are kept; they are float32 when they are read. None keeps them
            as they are.
    """

    def __init__(self, folder: str | Path, half: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.half = half

    def path(self, *identity: str) -> Path:
        """The file of what follows from these."""
        if self.half is not None:
            identity = (*identity, self.half)
        key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, *identity: str) -> bool:
        """Whether they are there, in a file that is whole by its length; its numbers are not read."""
        # Not through safetensors, which would let no other thread look into another file meanwhile.
        try:
            with open(self.path(*identity), "rb") as file:
                size, there = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
                header = json_of(file.read(size)) if size < there else {}
            ends = [facts["data_offsets"][1] for name, facts in header.items() if name != "__metadata__"]
            return there == 8 + size + max(ends, default=0) and _CHECKSUM in header.get("__metadata__", {})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):  # no header of such a file
            return False

    def read(self, *identity: str) -> dict[str, torch.Tensor] | None:
        """The tensors, or None when they are not there or their file is damaged."""
        try:
            with safe_open(self.path(*identity), "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                wanted = (file.metadata() or {}).get(_CHECKSUM)
        except (OSError, SafetensorError):
            return None
        if _checksum(found) != wanted:
            return None
        if self.half is None:
            return found
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}

    def remove(self, *identity: str) -> None:
        """Let go of what follows from these, if it is there and can be removed."""
        with contextlib.suppress(OSError):
            self.path(*identity).unlink()

    def write(self, tensors: dict[str, torch.Tensor], *identity: str) -> None:
        """Keep named tensors under what they follow from.

        Raises:
            CheckpointError: they cannot be written, or a number is too large for float16.
        """
        if self.half is not None:
            tensors = {name: self._halved(value) for name, value in tensors.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            save_tensors(tensors, self.path(*identity), {_CHECKSUM: _checksum(tensors)}, flush=False)
        except (OSError, SafetensorError) as error:
            raise not_kept(self.folder, error) from error

    def _halved(self, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        made = value.to(getattr(torch, self.half))
        if bool(made.isinf().any()) and not bool(value.isinf().any()):
            raise CheckpointError(
                f"an encoding has numbers up to {value.abs().max():g}, above the {torch.finfo(made.dtype).max:g} of "
                f"{self.half}: set data.cache_dtype to bfloat16 or float32."
            )
        return made


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, kinds and bytes; with CRC-32, which is several times as fast as disks are."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


class Fingerprints:
    """`fingerprint` of models of pipelines, remembered by their files, so that large ones are not loaded for it.

    Args:
        cache: where it is remembered; None for nowhere.
    """

    def __init__(self, cache: TensorCache | None = None) -> None:
        self.cache = cache

    def of(self, base: str, part: str, dtype: torch.dtype, load: Callable[[], nn.Module]) -> str:
        """That of one model.

        Args:
            base: folder or hub id of the pipeline.
            part: name of the model in it.
            dtype: in which it is loaded.
            load: gives the model.
        """
        if self.cache is None:
            return fingerprint(load())
        known = self.cache.read(*self._key(base, part, dtype))
        if known is not None:
            return bytes(known["letters"].tolist()).decode()
        made = fingerprint(load())
        # Of the hub, some files were not here before.
        self.cache.write({"letters": torch.tensor(list(made.encode()))}, *self._key(base, part, dtype))
        return made

    def _key(self, base: str, part: str, dtype: torch.dtype) -> tuple[str, ...]:
        """What a model follows from: where its files really are, their sizes and times."""
        config = transformer_file(base, "config.json", part)
        files = [] if config is None else sorted(file.resolve() for file in config.parent.iterdir())
        stamps = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()]
        return ("fingerprint 1", part, str(dtype), *stamps)


def fingerprint(module: nn.Module, samples: int = 64) -> str:
    """A name for a model by its config and weights: equal for equal ones, whatever folder they came from.

    Of each tensor, `samples` evenly spaced numbers count.
    """
    digest = hashlib.sha256()
    config = getattr(module, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    facts = {k: v for k, v in config.items() if not k.startswith("_")}
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().flatten()
        step = max(1, values.numel() // samples)
        picked = values[::step].double().cpu()
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A name for a tokenizer by what it makes of texts: equal for equal ones, whatever folder they came from."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # its rules: how texts are cleaned, split and framed
        rules = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # of the last call
            rules.pop(name, None)
        digest.update(json.dumps(rules, sort_keys=True).encode())
    return digest.hexdigest()[:16]
