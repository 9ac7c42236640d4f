"""LoRA on a transformer, and adapter files: only what training changed. `pipelines.adapted` loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..pipelines.deep_compression.adapted import FACTS_FILE, FULL_FILE, LORA_FILE, LORA_PREFIX
from .checkpoint import replaced, save_tensors


def add_lora(transformer: nn.Module, targets: str, rank: int, alpha: float) -> None:
    """Put a LoRA in float32 on the linear layers of a diffusers model whose names match the expression `targets`.

    Raises:
        ValueError: no layer has such a name, or the model has a LoRA already.
    """
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def merge(transformer: nn.Module) -> None:
    """Add the LoRA to the weights and remove it.

    Raises:
        ValueError: the sum is NaN or infinite.
    """
    transformer.fuse_lora()
    transformer.unload_lora()


def save_adapter(
    transformer: nn.Module, folder: Path, trained_fully: tuple[str, ...], facts: Mapping[str, Any], with_lora: bool
) -> Path:
    """Write the LoRA (as diffusers' `save_lora_weights` does), the fully trained parameters, and the facts.

    Args:
        transformer: with what was trained.
        folder: where to.
        trained_fully: beginnings of the names of parameters that were trained as they are.
        facts: what the adapter belongs to.
        with_lora: whether there is a LoRA.

    Raises:
        OSError, SafetensorError: it cannot be written; what was in the folder is untouched.
    """
    full = {n: p.detach() for n, p in transformer.named_parameters() if n.startswith(trained_fully)}
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    stated = json.dumps({**facts, "lora": with_lora, "transformer": config}, indent=2)
    with replaced(folder) as draft:
        save_tensors(full, draft / FULL_FILE)
        if with_lora:
            _save_lora(transformer, draft / LORA_FILE)
        (draft / FACTS_FILE).write_text(stated + "\n", encoding="utf-8")
    return folder


def _save_lora(transformer: nn.Module, path: Path) -> None:
    """As `save_lora_weights` of the pipelines does, which takes no model."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict

    config = transformer.peft_config["default"].to_dict()
    plain = {f"{LORA_PREFIX}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(plain, indent=2, sort_keys=True)}
    tensors = get_peft_model_state_dict(transformer, adapter_name="default")
    save_tensors({f"{LORA_PREFIX}.{name}": value for name, value in tensors.items()}, path, metadata)
