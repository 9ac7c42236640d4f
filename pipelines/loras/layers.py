"""Whether a file of a LoRA is for a kind of transformer: its layers' names and widths, without the model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights

from ..errors import first_line
from .contents import misfit, translated, unreadable


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
        matrices, error = translated(self._loader, file)
        if error is not None:
            other = f"has nothing for a {self.name}: it is for another family (diffusers: {first_line(error)})"
            return unreadable(error, file, self._loader.__name__) or other
        return misfit(matrices, self._modules(), str(self.name))

    def _modules(self) -> dict[str, torch.nn.Module]:
        with init_empty_weights():
            return dict(getattr(diffusers, str(self.name)).from_config(self._config).named_modules())
