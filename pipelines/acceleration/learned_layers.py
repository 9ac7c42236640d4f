"""Linear layers that a model learned for a method, as children of its self-attention modules while they are at work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from ..hooks.group_offloading import is_streamed


class LearnedLinear(nn.Linear):
    """A linear layer whose weights may lie elsewhere, or be of another dtype, than what it is given.

    So they do where a model is offloaded piece by piece and this layer came later, which no hook then moves.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input), self.bias.to(input))


def attach(transformer: nn.Module, layers: Iterable[tuple[nn.Module, nn.Linear]], name: str) -> None:
    """Give modules of a transformer a layer each.

    Where weights are copied to the device on a stream, diffusers knows those alone that were there when it began: the
    layers are then attributes that are no children, and their weights stay where they are.
    """
    streamed = any(is_streamed(module) for module in transformer.modules())
    for module, layer in layers:
        if streamed:
            vars(module)[name] = layer
        else:
            module.add_module(name, layer)


def detach(modules: Iterable[nn.Module], name: str) -> None:
    """Take the layers away again, where they are there."""
    for module in modules:
        if hasattr(module, name):
            delattr(module, name)
