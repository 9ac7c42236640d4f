"""A cache of tensors on disk, by what they follow from. Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..checkpoint import CheckpointError, save_tensors


class TensorCache:
    """Named tensors in safetensors files below a folder.

    Args:
        folder: made when the first tensor comes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def path(self, *identity: str) -> Path:
        """The file of what follows from these."""
        key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, *identity: str) -> bool:
        return self.path(*identity).is_file()

    def read(self, *identity: str) -> dict[str, torch.Tensor] | None:
        """The tensors, or None when they are not there or their file is damaged."""
        try:
            return load_file(self.path(*identity))
        except (FileNotFoundError, SafetensorError):
            return None

    def write(self, tensors: dict[str, torch.Tensor], *identity: str) -> None:
        """Keep named tensors under what they follow from.

        Raises:
            CheckpointError: they cannot be written.
        """
        try:
            save_tensors(tensors, self.path(*identity), flush=False)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the cache {self.folder} cannot be written: {error}. Make room, or choose another data.cache; what is "
                "there is used again."
            ) from error


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
