"""A cache of tensors on disk, by what they follow from. Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..checkpoint import CheckpointError, save_tensors


class TensorCache:
    """Named tensors in safetensors files below a folder.

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
        """Whether they are there, in a file that is whole; its numbers are not read."""
        try:
            with safe_open(self.path(*identity), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def read(self, *identity: str) -> dict[str, torch.Tensor] | None:
        """The tensors, or None when they are not there or their file is damaged."""
        try:
            found = load_file(self.path(*identity))
        except (OSError, SafetensorError):
            return None
        if self.half is None:
            return found
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}

    def remove(self, *identity: str) -> None:
        """Let go of what follows from these, if it is there."""
        self.path(*identity).unlink(missing_ok=True)

    def write(self, tensors: dict[str, torch.Tensor], *identity: str) -> None:
        """Keep named tensors under what they follow from.

        Raises:
            CheckpointError: they cannot be written, or a number is too large for float16.
        """
        if self.half is not None:
            tensors = {name: self._halved(value) for name, value in tensors.items()}
        try:
            save_tensors(tensors, self.path(*identity), flush=False)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the cache {self.folder} cannot be written: {error}. Make room, or choose another data.cache; what is "
                "there is used again."
            ) from error

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
