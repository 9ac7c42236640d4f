"""LoRAs for a diffusers pipeline: what a chain of nodes asks for, and putting it into the transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .wording import InputError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

TRANSFORMERS = ("transformer", "transformer_2")
TARGETS = ("all", *TRANSFORMERS)


@dataclass(frozen=True)
class Lora:
    """One LoRA of a chain.

    Args:
        path: a file, as diffusers, ComfyUI or musubi-tuner write them, or a folder with a `pytorch_lora_weights` file.
        weight: its update is multiplied by this.
        target: one of `TARGETS`; Wan 2.2 has two transformers, the first for the noisy part of the steps.

    Raises:
        InputError: there is no such file, or no such target.
    """

    path: Path
    weight: float = 1.0
    target: str = "all"

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise InputError(f"path is {self.path}: there is no such file or folder.")
        if self.target not in TARGETS:
            raise InputError(f"transformer is {self.target}: it must be one of {', '.join(TARGETS)}.")


def attach(pipe: DiffusionPipeline, loras: Sequence[Lora]) -> None:
    """Load LoRAs into a pipeline, beside those that it has already.

    Raises:
        InputError: the pipeline takes none, lacks the transformer that one is for, or a file does not fit it.
    """
    if loras and not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"loras: a {type(pipe).__name__} takes none. Leave them out.")
    parts = {name: part for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None}
    weights: dict[str, dict[str, float]] = {name: dict.fromkeys(_active(part), 1.0) for name, part in parts.items()}
    for number, lora in enumerate(loras):
        if lora.target != "all" and lora.target not in parts:
            raise InputError(
                f"loras: {lora.path.name} is for {lora.target}, and this pipeline has {' and '.join(parts)} alone. "
                "Choose all."
            )
        for name, part in parts.items():
            if lora.target in ("all", name):
                adapter = f"lora_{number}"
                _load(pipe, lora, adapter, name, part)
                weights[name][adapter] = lora.weight
    for name, part in parts.items():
        if loras and weights[name]:
            part.set_adapters(list(weights[name]), list(weights[name].values()))


def _load(pipe: DiffusionPipeline, lora: Lora, adapter: str, name: str, part: torch.nn.Module) -> None:
    from ..pipelines.errors import first_line

    file = {"weight_name": lora.path.name} if lora.path.is_file() else {}
    folder = str(lora.path.parent if file else lora.path)
    second = {"load_into_transformer_2": True} if name == "transformer_2" else {}
    try:
        pipe.load_lora_weights(folder, adapter_name=adapter, **file, **second)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"loras: {lora.path.name} cannot be loaded: {first_line(error)}") from error
    # diffusers only logs it when nothing in a file is of this model.
    if adapter not in getattr(part, "peft_config", {}):
        raise InputError(f"loras: nothing in {lora.path.name} is for the {type(part).__name__} of this pipeline.")


def _active(part: Any) -> list[str]:
    """The adapters that a transformer was loaded with, such as that of adapter-only weights."""
    return part.active_adapters() if getattr(part, "peft_config", None) else []
