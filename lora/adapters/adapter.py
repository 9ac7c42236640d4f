"""LoRA on a transformer, and adapter files: only what training changed. `pipelines.adapted` loads them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...pipelines.deep_compression.adapter_folder import FACTS_FILE, FULL_FILE, LORA_FILE, LORA_PREFIX
from ..checkpoints.written import replaced, save_tensors
from ..config import ConfigError, nearest


def add_lora(transformer: Any, targets: str | Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Put a LoRA in float32 on layers of a diffusers model.

    Args:
        transformer: the model.
        targets: regular expression of the names of the layers, or the names themselves.
        rank, alpha: of the LoRA.
        dropout: share of a layer's inputs that the LoRA is not shown.

    Raises:
        ValueError: no layer has such a name, or the model has a LoRA already.
    """
    from peft import LoraConfig

    chosen = targets if isinstance(targets, str) else list(targets)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, lora_dropout=dropout))
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def layers_named(skeleton: nn.Module, targets: Sequence[str], setting: str) -> list[str]:
    """The layers of a transformer whose names end as the targets say.

    Args:
        skeleton: the transformer, with or without weights.
        targets: ends of names, or whole names.
        setting: that holds them, for messages.

    Raises:
        ConfigError: a target is the end of no name.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names = [name for name, module in skeleton.named_modules() if isinstance(module, kinds)]
    for target in targets:
        if not any(_ends(name, target) for name in names):
            # Layers of different blocks are called the same behind their number.
            known = sorted({re.sub(r"^.*\.\d+\.(?=[a-z])", "", name) for name in names})
            raise ConfigError(f"{setting}: no layer is called {target}: {nearest(target, known)}")
    return [name for name in names if any(_ends(name, target) for target in targets)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


@contextlib.contextmanager
def without_lora(transformer: nn.Module) -> Iterator[None]:
    """The transformer as it is without its LoRA, which stays trainable.

    `disable_adapters` also takes the gradients of the LoRA away, and FSDP, which looks for what is trained in the first
    pass, would then keep the gradients of all further ones in half precision.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def merge(transformer: Any) -> None:
    """Add the LoRA to the weights and remove it.

    Raises:
        ValueError: the sum is NaN or infinite.
    """
    transformer.fuse_lora()
    transformer.unload_lora()


@dataclass(frozen=True)
class AdaptedModel:
    """What an adapter file says of the transformer that it is for.

    Args:
        config: of the transformer.
        lora: config of its LoRA, or None without one.
    """

    config: Mapping[str, Any]
    lora: Mapping[str, Any] | None

    @classmethod
    def of(cls, transformer: Any) -> AdaptedModel:
        lora = getattr(transformer, "peft_config", {}).get("default")
        config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
        return cls(config, None if lora is None else lora.to_dict())


def save_adapter(
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    trained_fully: tuple[str, ...],
    facts: Mapping[str, Any],
    model: AdaptedModel,
) -> Path:
    """Write the LoRA (as diffusers' `save_lora_weights` does), the fully trained parameters, and the facts.

    Args:
        tensors: parameters of the transformer by name; what was not trained is left out.
        folder: where to.
        trained_fully: beginnings of the names of parameters that were trained as they are.
        facts: what the adapter belongs to.
        model: the transformer.

    Raises:
        NotWritten: it cannot be written; what was in the folder is untouched.
    """
    full = {name: value.detach() for name, value in tensors.items() if name.startswith(trained_fully)}
    stated = json.dumps({**facts, "lora": model.lora is not None, "transformer": dict(model.config)}, indent=2)
    with replaced(folder) as draft:
        save_tensors(full, draft / FULL_FILE)
        if model.lora is not None:
            _save_lora(tensors, model.lora, draft / LORA_FILE)
        (draft / FACTS_FILE).write_text(stated + "\n", encoding="utf-8")
    return folder


def _save_lora(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], path: Path) -> None:
    """As `save_lora_weights` of the pipelines does, which takes no model; nor need one be in memory here."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    plain = {f"{LORA_PREFIX}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(plain, indent=2, sort_keys=True)}
    # peft puts the name of the adapter into those of the parameters, and files do without.
    lora = {name.replace(".default.", "."): value for name, value in tensors.items() if ".lora_" in name}
    save_tensors({f"{LORA_PREFIX}.{name}": value for name, value in lora.items()}, path, metadata)
