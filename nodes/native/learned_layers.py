"""Linear layers that a model learned for a method, in ComfyUI's care: a small model beside the MODEL.

ComfyUI loads it to the device with the MODEL, keeps some or all of it in main memory where room is short, and moves
weights that are elsewhere, or of another dtype, when a layer is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..report.wording import InputError

KEY = "vidaccel_learned_layers"
WAN = "WanModel"
"""The class of the native models that have diffusers' WanTransformer3DModel in them, and nothing else."""


def check_wan(model: Any, file: str, tasks: str) -> None:
    """Raise InputError unless a diffusion model is of the class that a file was made for.

    Args:
        model: ComfyUI's module of it.
        file: name of the file. tasks: what its models do, for the message.
    """
    name = type(model).__name__
    if name != WAN:
        raise InputError(f"model is a {name}: {file} is for Wan 2.1 or 2.2 ({tasks}).")


@dataclass(frozen=True)
class LearnedLayers:
    """Linear layers, one for each of some layers of a model.

    Args:
        modules: by the number of the model's layer.
        patcher: ComfyUI's ModelPatcher of all of them.
    """

    modules: Mapping[int, nn.Module]
    patcher: Any

    def put_beside(self, model: Any) -> None:
        """Have ComfyUI load them together with a MODEL, a clone of which has them too."""
        model.set_additional_models(KEY, [self.patcher])


def learned_layers(model: Any, tensors: Mapping[int, Mapping[str, torch.Tensor]]) -> LearnedLayers:
    """Layers on the devices of a MODEL.

    Args:
        model: ComfyUI's ModelPatcher.
        tensors: number of a layer -> its `weight` `[out, in]` and `bias` `[out]`, in the dtype that they shall have.
    """
    patcher = _patcher(tensors, model.load_device, model.offload_device)
    return LearnedLayers({int(name): module for name, module in patcher.model.items()}, patcher)


def _patcher(
    tensors: Mapping[int, Mapping[str, torch.Tensor]],
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> Any:
    """A ModelPatcher of layers; see `learned_layers`. The last argument is what ComfyUI calls a loader with."""
    import comfy.model_patcher
    import comfy.ops

    made = nn.ModuleDict()
    # Of the executor's inference tensors no gradient could be computed.
    with torch.inference_mode(False), torch.no_grad():
        for layer, own in tensors.items():
            out, into = own["weight"].shape
            linear = comfy.ops.manual_cast.Linear(into, out, device="cpu", dtype=own["weight"].dtype)
            linear.load_state_dict(dict(own))
            made[str(layer)] = linear.requires_grad_(False)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(made, load_device, offload_device)

    # For a model on each GPU, ComfyUI has the loader of each make it anew.
    def again(disable_dynamic: bool = False) -> Any:
        own = {int(name): module.state_dict() for name, module in made.items()}
        return _patcher(own, load_device, offload_device, disable_dynamic)

    patcher.cached_patcher_init = (again, ())
    return patcher
