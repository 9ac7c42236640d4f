"""Frozen linear layers whose weights stay in the memory of the CPU, and are copied to the GPU where they are needed.

The copy is an ordinary tensor of the graph: where a backward pass needs it, it lives until that is done, and no longer.
So gradient checkpointing, which holds the graph of one block at a time, holds the copies of one block at a time.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..config import ConfigError
from .memory import blocks_of


class Offloaded(nn.Module):
    """A frozen linear layer, whose weights are no parameters: they do not follow the model to a GPU.

    Args:
        linear: whose weights it has; on the CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Pinned, a copy takes as long as the bus does.
        pinned = torch.cuda.is_available()
        kept = [None if value is None else value.detach().cpu() for value in (linear.weight, linear.bias)]
        self._kept = [value.pin_memory() if pinned and value is not None else value for value in kept]

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]`, on the CPU."""
        return self._kept[0]

    @property
    def bias(self) -> torch.Tensor | None:
        """`[out]`, on the CPU."""
        return self._kept[1]

    def copied(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """What is computed with."""
        return value.to(device, non_blocking=True, copy=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]`, as `nn.Linear`."""
        weight, bias = (None if value is None else self.copied(value, x.device) for value in self._kept)
        return functional.linear(x, weight, bias)


def offload(transformer: nn.Module, count: int) -> int:
    """Replace the frozen linear layers of the last blocks of a transformer that is on the CPU.

    Args:
        transformer: with its LoRA, if it gets one.
        count: of the blocks.

    Returns:
        How many layers were replaced.

    Raises:
        ConfigError: there are not so many blocks.
    """
    replaced = 0
    for block in _last(transformer, count):
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and not any(p.requires_grad for p in child.parameters()):
                    setattr(parent, name, Offloaded(child))
                    replaced += 1
    return replaced


def offloaded_numbers(skeleton: nn.Module, count: int) -> tuple[int, int]:
    """How many numbers `offload` takes from a GPU, and how many of one block come back while it is at work.

    Raises:
        ConfigError: there are not so many blocks.
    """
    sizes = [
        sum(p.numel() for m in block.modules() if type(m) is nn.Linear for p in m.parameters())
        for block in _last(skeleton, count)
    ]
    return sum(sizes), max(sizes, default=0)


def _last(transformer: nn.Module, count: int) -> list[nn.Module]:
    blocks = blocks_of(transformer)
    if count > len(blocks):
        raise ConfigError(f"model.offload_blocks is {count}, and the transformer has {len(blocks)} blocks: give fewer.")
    return blocks[len(blocks) - count :]
