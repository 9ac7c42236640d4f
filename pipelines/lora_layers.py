"""Whether a file of a LoRA is for a kind of transformer: its layers' names and widths, without the model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights


class LoraLayers:
    """The layers of a pipeline's transformer that a LoRA may have.

    Args:
        pipeline_class: name of the pipeline's class.
        config: of its transformer.
    """

    def __init__(self, pipeline_class: str, config: Mapping[str, Any]) -> None:
        self.name = config.get("_class_name")
        self._loader = getattr(diffusers, pipeline_class, None)
        self._config = dict(config)

    @property
    def known(self) -> bool:
        """Whether they can be told; the pipeline loads no LoRA, or is none of diffusers' own, where not."""
        return hasattr(self._loader, "lora_state_dict") and isinstance(self.name, str) and hasattr(diffusers, self.name)

    def misfit(self, file: Path) -> str:
        """Why a safetensors file is not for them, in words behind its name; "" where some of it is."""
        modules = self._modules()
        found = 0
        for key, value in self._translated(file).items():
            name = key.removeprefix("transformer.")
            layer, first, _ = name.partition(".lora_A.")
            while layer not in modules and "." in layer:  # matrices of other kinds than a LoRA's are named otherwise
                layer = layer.rpartition(".")[0]
            module = modules.get(layer)
            if module is None or next(module.children(), None) is not None:
                continue
            found += 1
            width = getattr(module, "in_features", None)
            if first and width is not None and value.shape[1] != width:
                return f"is for layers of width {value.shape[1]}, and {layer} of this {self.name} has {width}"
        return "" if found else f"has nothing for a {self.name}: it is for another family"

    def _modules(self) -> dict[str, torch.nn.Module]:
        with init_empty_weights():
            return dict(getattr(diffusers, str(self.name)).from_config(self._config).named_modules())

    def _translated(self, file: Path) -> Mapping[str, torch.Tensor]:
        """The matrices by diffusers' names; none where its loader for this pipeline cannot translate them."""
        loader: Any = self._loader
        try:
            made = loader.lora_state_dict(str(file.parent), weight_name=file.name)
        except (OSError, ValueError, RuntimeError, LookupError):
            return {}
        return made[0] if isinstance(made, tuple) else made
