"""The LoRA of an adapter of this package's put into a native MODEL: all of it, or an error.

ComfyUI logs each layer whose shape does not fit and samples without it. With attention that needs the LoRA, that is a
broken video; so what does not fit is refused before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..report.wording import InputError


def with_lora(model: Any, tensors: Mapping[str, torch.Tensor], strength: float, *, field: str, file: str) -> Any:
    """A clone of a MODEL whose weights a LoRA changes; the MODEL itself stays as it is.

    Args:
        model: ComfyUI's ModelPatcher.
        tensors: matrices `[rank, in]` (`.lora_A.weight`) and `[out, rank]` (`.lora_B.weight`) by ComfyUI's names of the
            layers, and changes of biases (`.diff_b`).
        strength: they are multiplied by this.
        field, file: the input that named the file and the file's name, for messages.

    Raises:
        InputError: the MODEL lacks one of the layers, or has it in another size.
    """
    from comfy.lora import load_lora, model_lora_keys_unet

    found = load_lora(dict(tensors), model_lora_keys_unet(model.model, {}), log_missing=False)
    layers = {name.partition(".lora_")[0]: tensor.shape[0] for name, tensor in tensors.items() if ".lora_B." in name}
    biases = sum(name.endswith(".diff_b") for name in tensors)
    if len(found) != len(layers) + biases:
        raise InputError(
            f"{field}: {file} has {len(layers)} layers, of which this MODEL has {len(found) - biases}: it is of "
            "another model."
        )
    for layer, outputs in layers.items():
        inputs = tensors[f"{layer}.lora_A.weight"].shape[1]
        module = model.model.get_submodule(layer)
        # Of the module, and not of its weight, which may be packed.
        own = getattr(module, "in_features", inputs), getattr(module, "out_features", outputs)
        if own != (inputs, outputs):
            name = layer.removeprefix("diffusion_model.")
            raise InputError(
                f"{field}: {file} is for a model whose {name} makes {outputs} channels of {inputs}, and this MODEL's "
                f"makes {own[1]} of {own[0]}: give the one that was trained on this model."
            )
    clone = model.clone()
    clone.add_patches(found, strength)
    return clone
