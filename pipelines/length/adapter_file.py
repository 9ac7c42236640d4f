"""Files of LoRAs for longer videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..files.adapter_header import facts_of
from ..files.run_folder import NoAdapter, chosen_adapter
from ..loras.contents import broken
from .trained import RECIPE, LengthError, TrainedLength, trained_length


@dataclass(frozen=True, eq=False)
class LengthAdapter:
    """A LoRA for longer videos as its file has it; the weights are read when they are needed.

    Args:
        path: of the file.
        base, base_hash: name and hash of the transformer that it was trained on.
        part: name of that transformer in its pipeline.
        trained: the attention that it belongs to.
    """

    path: Path
    base: str
    base_hash: str
    part: str
    trained: TrainedLength

    def weights(self) -> dict[str, torch.Tensor]:
        """The matrices of the LoRA by their names in the file.

        Raises:
            LengthError: some are none, or lack their other half.
        """
        with safe_open(self.path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if why := broken(found):
            raise LengthError(f"{self.path} {why}.")
        return found


def read_length(location: str | Path) -> LengthAdapter:
    """What the header of a LoRA for longer videos says.

    Args:
        location: of the file, its folder, or that of a run, see `run_folder.adapter_path`.

    Raises:
        LengthError: there is none, or it is none of the recipe `length`.
    """
    try:
        path = chosen_adapter(location)
    except NoAdapter as error:
        raise LengthError(str(error)) from error
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise LengthError(f"{path} is no LoRA that can be read: {error}") from error
    facts: dict[str, Any] = facts_of(path)
    trained = trained_length(facts, path.name)
    if trained is None:
        recipe = facts.get("recipe")
        kind = f"a LoRA of the recipe {recipe}" if recipe else "not written by this package's trainer"
        raise LengthError(f"{path} is {kind}: give one that the recipe {RECIPE} made.")
    try:
        return LengthAdapter(path, str(facts["base"]), str(facts["base_hash"]), str(facts["part"]), trained)
    except KeyError as error:
        raise LengthError(f"{path}: its header lacks {error}: train it again.") from error
