"""EMA of the trained weights of a phase."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .distributed.sharding import copy_whole, is_sharded, whole

Tensors = dict[str, torch.Tensor]


class EMA:
    """Exponential moving averages of parameters, which may be sharded.

    Args:
        named: the parameters.
        decay: share of the EMA that stays in each step.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        self.named = dict(named)
        # Sharded tensors have no operations on many at once.
        foreach = not any(is_sharded(parameter) for parameter in self.named.values())
        self._ema = EMAModel(self.named.values(), decay=decay, foreach=foreach)

    @property
    def steps(self) -> int:
        """How many updates there were."""
        return self._ema.optimization_step

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The EMA weights, in the order of the parameters."""
        return self._ema.shadow_params

    def update(self) -> None:
        """Take in the weights as they are."""
        self._ema.step(self.named.values())

    def whole(self, keep: bool = True) -> Tensors:
        """The EMA weights by name, whole and on the CPU; every process must call this (see `sharding.whole`)."""
        return dict(zip(self.named, whole(self.tensors, keep), strict=True))

    def restore(self, weights: Mapping[str, torch.Tensor], steps: int) -> None:
        """Go on from what `whole` and `steps` gave."""
        for shadow, name in zip(self.tensors, self.named, strict=True):
            copy_whole(shadow, weights[name])
        self._ema.optimization_step = steps

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters have their EMA weights inside the block."""
        self._ema.store(self.named.values())
        self._ema.copy_to(self.named.values())
        try:
            yield
        finally:
            self._ema.restore(self.named.values())
