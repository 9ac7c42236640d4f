"""The linear layers of a transformer's blocks in 8 bits by torchao, and back."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

from ..acceleration.checks import places_of
from ..acceleration.families import Family
from ..hooks.group_offloading import is_in_group
from ..hooks.undo import QUANTISED
from ..hooks.unsaved import TAKE_OUT, Unsaved
from ..loras.kept_loras import tuner_layers
from .errors import PresetError
from .levers import Quantize

_CONFIGS = {
    ("int8", False): "Int8WeightOnlyConfig",
    ("int8", True): "Int8DynamicActivationInt8WeightConfig",
    ("fp8", False): "Float8WeightOnlyConfig",
    ("fp8", True): "Float8DynamicActivationFloat8WeightConfig",
}
"""(kind, activations) -> the class of torchao that says how."""
_REPR = "extra_repr"
"""Attribute of a layer that torchao sets, beside the weight."""
FP8_CAPABILITY = (8, 9)
"""Of the first NVIDIA GPUs that multiply float8."""


class Quantised:
    """The layers of one transformer. Made by `quantise`, before they are in 8 bits.

    Args:
        transformer: without what wraps it.
        originals: weights of its layers; none where they are not kept.
        kept: whether they are.
    """

    def __init__(
        self, transformer: torch.nn.Module, originals: dict[torch.nn.Linear, torch.nn.Parameter], kept: bool
    ) -> None:
        self._transformer: torch.nn.Module | None = transformer
        self._originals, self.kept = originals, kept
        self._others = _others(transformer, originals)
        self._reprs = {layer: vars(layer).get(_REPR) for layer in originals}
        fix = TAKE_OUT if kept else "load the model again without quantize"
        self._unsaved = Unsaved(transformer, f"its layers are in 8 bits{'' if kept else ' for good'}; {fix}")

    def remove(self) -> None:
        """Give the layers their weights back, where they were kept, in the dtype that the transformer has now. A second
        call does nothing."""
        if not self.kept:
            return
        for layer, weight in self._originals.items():
            made = weight.data.to(layer.weight.device, self._dtype_now(weight.dtype))
            layer.weight = torch.nn.Parameter(made, requires_grad=weight.requires_grad)
            vars(layer).pop(_REPR, None)  # torchao's, which calls the one before, so that they would pile up
            if (own := self._reprs[layer]) is not None:
                vars(layer)[_REPR] = own
        if self._transformer is not None:
            _make_loras_plain(self._transformer, self._originals)
        self._unsaved.remove()
        self._transformer, self._originals, self._others, self._reprs = None, {}, {}, {}

    def _dtype_now(self, before: torch.dtype) -> torch.dtype:
        """What `to(dtype)` made of the parameters that had a dtype before; layers in 8 bits do not tell."""
        module, name = self._others.get(before, (None, ""))
        now = getattr(module, name, None)
        return now.dtype if isinstance(now, torch.Tensor) else before


def _others(
    transformer: torch.nn.Module, layers: Container[torch.nn.Module]
) -> dict[torch.dtype, tuple[torch.nn.Module, str]]:
    """Of each dtype, a parameter that is not among the weights of layers, by its module and its name there."""
    found: dict[torch.dtype, tuple[torch.nn.Module, str]] = {}
    for path, module in transformer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if ".lora_" not in path and not (module in layers and name == "weight"):
                found.setdefault(parameter.dtype, (module, name))
    return found


def _make_loras_plain(transformer: torch.nn.Module, layers: Container[torch.nn.Module]) -> None:
    """Have LoRAs that were put round layers in 8 bits be as others, which can be fused."""
    from peft.tuners.lora import Linear
    from peft.tuners.lora.torchao import TorchaoLoraLinear

    for lora in tuner_layers(transformer).values():
        if type(lora) is TorchaoLoraLinear and lora.get_base_layer() in layers:
            # The same object, with the same matrices: who keeps a LoRA active has it.
            lora.__class__ = Linear  # type: ignore[assignment]
            del lora.get_apply_tensor_subclass


def is_to_do(pipe: Any, how: Quantize | None) -> bool:
    """Whether there are layers to be put into 8 bits: not those that are so for good already, in the same way."""
    return how is not None and how != getattr(pipe, QUANTISED, None)


def layers_of(transformer: Any, family: Family) -> dict[str, torch.nn.Linear]:
    """The linear layers of the blocks, by path: nearly all of the weights, and none that other code reads the dtype of.

    Args:
        transformer: without what wraps it. family: of it.
    """
    heads = tuple(dict.fromkeys(site.split("*")[0] for site in family.sites))
    return {
        path: module
        for path, module in transformer.named_modules()
        if path.startswith(heads) and isinstance(module, torch.nn.Linear) and ".lora_" not in path
    }


def quantise(transformer: Any, family: Family, how: Quantize, device: torch.device | str | None = None) -> Quantised:
    """Put the layers of a transformer that `check_quantize` let through into 8 bits.

    Args:
        transformer: without what wraps it. family: of it.
        how: in which way.
        device: where the transformer goes, one layer after the other, each in 8 bits before the next; None leaves it.
    """
    from torchao import quantization

    layers = layers_of(transformer, family)
    # In main memory: what is kept must not fill the accelerator's, which this is to save.
    originals = {
        layer: torch.nn.Parameter(layer.weight.data.cpu(), requires_grad=layer.weight.requires_grad)
        for layer in (layers.values() if how.keep else ())
    }
    made = Quantised(transformer, originals, how.keep)
    config = getattr(quantization, _CONFIGS[how.kind, how.activations])()
    try:
        quantization.quantize_(transformer, config, filter_fn=lambda module, path: path in layers, device=device)
    except BaseException:
        made.remove()
        raise
    return made


def check_quantize(part: str, transformer: Any, family: Family, how: Quantize) -> None:
    """Raise PresetError where a transformer cannot be quantised.

    Args:
        part: name of the transformer. transformer: without what wraps it. family: of it.
        how: in which way.
    """
    if any(is_in_group(module) for module in transformer.modules()):
        problem = f"the {part} is offloaded in groups (enable_group_offload), which moves the weights that it found"
        fix = "Offload whole parts (enable_model_cpu_offload): in 8 bits a transformer takes half."
        raise PresetError("quantize", problem, fix, how.kind)
    layers = layers_of(transformer, family)
    for path, layer in layers.items():
        if type(layer.weight.data) is not torch.Tensor:
            problem = f"{path} of the {part} is quantised already ({type(layer.weight.data).__name__})"
            raise PresetError("quantize", problem, "Load the model without it, or leave quantize out.", how.kind)
        if layer.weight.is_meta:
            problem = f"the weights of the {part} are offloaded layer by layer, and are not here to be quantised"
            raise PresetError("quantize", problem, "Apply the preset before the offloading.", how.kind)
        if layer.weight.element_size() == 1:
            problem = f"{path} of the {part} is stored in {layer.weight.dtype}"
            raise PresetError("quantize", problem, "Leave quantize out.", how.kind)
    if not layers:
        raise PresetError("quantize", f"the blocks of the {part} have no linear layers", "Leave it out.", how.kind)
    if how.kind == "fp8" and how.activations:
        device = places_of(transformer)[-1]  # offloaded weights lie on the CPU between calls
        if device.type == "cpu" or (
            device.type == "cuda"
            and torch.version.hip is None
            and torch.cuda.get_device_capability(device) < FP8_CAPABILITY
        ):
            problem = f"activations in fp8 need a GPU that multiplies float8 (capability 8.9), and this is {device}"
            raise PresetError("quantize", problem, "Leave activations out, or take int8.", how.kind)
