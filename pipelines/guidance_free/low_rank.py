"""The LoRA of one layer: merged into its weight, which comes back as it was, or added to the layer's result."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from ..acceleration.copies import CopiedNotPickled
from ..hooks.seen_hook import SeenHook

_MERGED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> a dtype in which its bits can be added."""


class LowRank(CopiedNotPickled):
    """The update gate * up @ down of the weight of a layer.

    No layer of peft: others may put LoRAs round the same layer, and take them away, before and after.

    Args:
        name: of the layer, for messages.
        layer: the layer, without the LoRAs of others.
        down: `[rank, in]`.
        up: `[out, rank]`.

    Raises:
        ValueError: a layer that is not linear, or of another size.
    """

    def __init__(self, name: str, layer: nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
        features = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
        if features != (down.shape[-1], up.shape[0]) or down.shape[0] != up.shape[-1]:
            raise ValueError(f"{name} takes {features[0]} and makes {features[1]}, and the LoRA is of another size")
        self.name, self.layer, self.down, self.up = name, layer, down, up
        self._original: torch.Tensor | None = None
        self._bits = 0
        self._gate: float = 0.0
        self._hook: SeenHook | None = None

    def why_not_merged(self) -> str | None:
        """Why the weight cannot be changed, or None."""
        weight: Any = getattr(self.layer, "weight", None)
        if not isinstance(weight, torch.Tensor) or type(self.layer).forward is not nn.Linear.forward:
            return f"{self.name} is a {type(self.layer).__name__}"
        if weight.device.type == "meta":
            return f"the weights of {self.name} are offloaded"
        if type(weight.data) is not torch.Tensor:
            return f"the weights of {self.name} are kept as {type(weight.data).__name__}"
        if weight.dtype not in _MERGED:
            return f"the weights of {self.name} are kept as {str(weight.dtype).removeprefix('torch.')}"
        if tuple(weight.shape) != (self.up.shape[0], self.down.shape[1]):
            return f"the weights of {self.name} are sharded"
        return None

    @property
    def kept_bytes(self) -> int:
        """Memory that the original takes while the LoRA is merged, on the CPU."""
        return 0 if self._original is None else self._original.nbytes

    def merge(self, gate: float) -> None:
        """Have the weight be that of the layer with the update, `gate` times; 0 is the original."""
        if self._original is not None and gate == self._gate:
            return
        weight: Any = self.layer.weight
        if gate == 0 or not self._is_untouched(weight):
            self.remove()
        if gate == 0:
            return
        if self._original is None:
            original = weight.data
            # On the CPU whatever the device: the original would be as large as the model beside it.
            self._original = original.to("cpu", copy=True)
        else:
            original = self._original.to(weight.device)
        self._gate = gate
        weight.data.copy_(self._merged(original))
        self._bits = _sum_of_bits(weight.data)
        _forget_casts(weight)

    def _is_untouched(self, weight: torch.Tensor) -> bool:
        """Whether a weight is, to the bit, what was merged, so that another merge may begin from the original."""
        return (
            self._original is not None
            and weight.device.type != "meta"
            and weight.dtype == self._original.dtype
            and _sum_of_bits(weight.data) == self._bits
        )

    def _merged(self, original: torch.Tensor) -> torch.Tensor:
        # In float64, which no setting of a device makes less (TF32, autocast): what another device made is put back to
        # the bit. Rounded once, to what the weight is kept in.
        exact = torch.float32 if original.device.type == "mps" else torch.float64
        up, down = (matrix.to(original.device, exact) for matrix in (self.up, self.down))
        with torch.autocast(original.device.type, enabled=False):
            return torch.addmm(original.to(exact), up, down, alpha=self._gate).to(original.dtype)

    def restore(self) -> None:
        """Have the weight be the layer's own again: to the bit, unless others changed it meanwhile."""
        if self._original is None:
            return
        weight: Any = self.layer.weight
        if weight.device.type == "meta":
            raise RuntimeError(
                f"the weights of {self.name} were offloaded while a guidance-free adapter was merged into them, and "
                "cannot be put back: load the pipeline again."
            )
        original = self._original.to(weight.device)
        merged = self._merged(original).to(weight.dtype)
        coarse = max((original.dtype, weight.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        # Moved to another device since, the sum may round another way.
        near = 8 * torch.finfo(torch.float32).eps * float(original.abs().max())
        if torch.allclose(weight.data, merged, rtol=2 * torch.finfo(coarse).eps, atol=near):
            weight.data.copy_(original)
        else:  # a LoRA was fused into it, for example, which stays
            weight.data.copy_(weight.data.float() + (original.float() - merged.float()))
        _forget_casts(weight)
        self._original, self._gate = None, 0.0

    def stand_beside(self, gate: float) -> None:
        """Have the update added to the layer's results, `gate` times."""
        self.restore()
        self._gate = gate
        if self._hook is None:
            self._hook = SeenHook(self.layer, self._add)

    def stand_aside(self) -> None:
        """Have the update not count until it is merged, or stands beside, again."""
        self.restore()
        self._gate = 0.0

    def _add(self, module: nn.Module, args: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor | None:
        if self._gate == 0:
            return None
        if self.down.device != made.device:  # of a part that was moved, by offloading for example
            self.down, self.up = self.down.to(made.device), self.up.to(made.device)
        dtype = args[0].dtype
        update = functional.linear(functional.linear(args[0], self.down.to(dtype)), self.up.to(dtype))
        return made + self._gate * update.to(made.dtype)

    def remove(self) -> None:
        """Have the layer be as it was. A second call does nothing."""
        self.restore()
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._gate = None, 0.0


def _sum_of_bits(weight: torch.Tensor) -> int:
    """A number that another weight does not have but by a rare chance, in a fraction of the time of a comparison."""
    return int(weight.view(_BITS[weight.element_size()]).sum(dtype=torch.int64))


def _forget_casts(weight: torch.Tensor) -> None:
    """Have autocast cast a weight anew: what it keeps within a block it does not compare."""
    if torch.is_autocast_enabled(weight.device.type):
        torch.clear_autocast_cache()


def low_ranks(transformer: nn.Module, lora: dict[str, torch.Tensor], part: str) -> list[LowRank]:
    """The updates in a LoRA, by diffusers' names such as `transformer.blocks.0.attn1.to_q.lora_A.weight`.

    Args:
        transformer: that it is for.
        lora: the matrices.
        part: what its names begin with.

    Raises:
        ValueError: a layer that the transformer does not have, or of another size, or a matrix without its other.
    """
    found = []
    for name in sorted({key.rpartition(".lora_")[0] for key in lora}):
        pair = [lora.get(f"{name}.lora_{letter}.weight") for letter in "AB"]
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"it has not two matrices for {name}")
        layer = bare_layer(transformer, name.removeprefix(f"{part}."))
        found.append(LowRank(name, layer, pair[0], pair[1]))
    if 2 * len(found) != len(lora) or not found:
        raise ValueError("it has other tensors than the matrices of a LoRA")
    return found


def bare_layer(transformer: nn.Module, name: str) -> nn.Module:
    """A layer without the LoRAs round it.

    Raises:
        ValueError: there is none of this name.
    """
    try:
        layer = transformer.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no layer {name}") from error
    while isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    return layer


def gate_of(scale: float, highest: float | None) -> float:
    """How many times a LoRA counts at a guidance scale.

    Args:
        scale: at least 1.
        highest: at which it counts once, of a gated adapter; None for one that is not.
    """
    return 1.0 if highest is None else (scale - 1) / (highest - 1)
