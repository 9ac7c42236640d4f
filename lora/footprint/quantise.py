"""Frozen weights in 8 bits, through diffusers and torchao: half the memory of bfloat16, and the same operations."""

from __future__ import annotations

from typing import Any

from ..optional import optional

_CONFIGS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
"""Kind -> the class of torchao that says how. Only weights are quantised; what they are multiplied with is not."""


def quantisation(kind: str) -> Any:
    """What `from_pretrained` of a diffusers model takes as `quantization_config`; None for "none".

    Args:
        kind: "none", "int8" or "fp8".

    Raises:
        ConfigError: torchao is missing.
    """
    if kind == "none":
        return None
    module = optional("torchao.quantization", f"model.quantise is {kind}")
    from diffusers import TorchAoConfig

    return TorchAoConfig(getattr(module, _CONFIGS[kind])())
