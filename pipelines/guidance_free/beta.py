"""How a transformer is told beta = 1 / guidance scale: an embedding that is added to that of the timestep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from ..loras.named_lora import lora_layers

BETA = "beta_embedder"
"""The embedder's name in the transformer while it is trained, and what its keys in files begin with."""

_SLOTS = {"WanTransformer3DModel": "condition_embedder.time_embedder"}
"""Class of a transformer -> its module that makes `[B, D]` or `[B, N, D]` of timesteps; all modulation follows from it.

Only of models that are told no guidance scale yet: those that are have the slot, and are distilled on it.
"""


class BetaEmbedder(nn.Module):
    """beta `[B]` in (0, 1] -> `[B, width]`: a sinusoidal embedding, and a layer that starts at zero.

    As in the published code for DiT (thu-ml/GFT), of 1000 beta and without a bias, but behind the MLP of the time.

    Args:
        width: of the time embedding.
        frequencies: numbers of the sinusoidal embedding; even.
    """

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.linear = nn.Linear(frequencies, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, beta: torch.Tensor) -> torch.Tensor:
        waves = get_timestep_embedding(
            1000 * beta.float(), self.linear.in_features, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.linear(waves.to(self.linear.weight.dtype))


def no_slot(transformer: nn.Module) -> str | None:
    """Why a transformer cannot be told beta, or None."""
    if any(cls.__name__ in _SLOTS for cls in type(transformer).__mro__):
        return None
    return (
        f"a {type(transformer).__name__} has no free slot for beta: guidance without a second pass is for transformers "
        f"of Wan ({', '.join(_SLOTS)})"
    )


def time_embedder(transformer: nn.Module) -> nn.Module:
    """The module whose result beta is added to; of a transformer that has one (`no_slot`)."""
    return transformer.get_submodule(
        next(_SLOTS[c.__name__] for c in type(transformer).__mro__ if c.__name__ in _SLOTS)
    )


class BetaSlot:
    """Tells a transformer beta, by hooks: its embedding is added to that of the timestep, and a LoRA is made gated.

    A gated LoRA (and embedding) counts (1 / beta - 1) / (highest - 1) times, as guidance itself grows with its scale:
    at a scale of 1 the model is the base to the bit. That is not in the paper, whose models learn it.

    Args:
        transformer: that has a slot.
        embedder: of beta; need not be a part of the transformer.
        beta: asked in each forward pass: `[B]` or `[1]`, or None, with which nothing is added.
        adapter: name of the LoRA.
        highest: guidance scale at which a gated LoRA counts fully; None for one that is not gated.
    """

    def __init__(
        self,
        transformer: nn.Module,
        embedder: BetaEmbedder,
        beta: Callable[[], torch.Tensor | None],
        adapter: str,
        highest: float | None,
    ) -> None:
        self.embedder, self.highest, self._beta = embedder, highest, beta
        self._hooks = [time_embedder(transformer).register_forward_hook(self._add)]
        if highest is not None:
            outs = [layer.lora_B[adapter] for layer in lora_layers(transformer, adapter)]
            self._hooks += [out.register_forward_hook(self._weigh) for out in outs]

    def _gate(self, beta: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        """What `[B, ...]` is multiplied by."""
        gate = torch.ones_like(beta) if self.highest is None else (1 / beta - 1) / (self.highest - 1)
        return gate.to(of).view(-1, *[1] * (of.ndim - 1))

    def _add(self, module: nn.Module, args: Any, time: torch.Tensor) -> torch.Tensor | None:
        beta = self._beta()
        if beta is None:
            return None
        if self.embedder.linear.weight.device != time.device:  # of a part that was moved, by offloading for example
            self.embedder.to(time.device)
        embedding = self.embedder(beta.to(time.device)).to(time.dtype)
        return time + self._gate(beta, time) * (embedding if time.ndim == 2 else embedding[:, None])

    def _weigh(self, module: nn.Module, args: Any, update: torch.Tensor) -> torch.Tensor | None:
        beta = self._beta()
        return None if beta is None else update * self._gate(beta, update)

    def remove(self) -> None:
        """Take the hooks away. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()


def width_of(transformer: nn.Module) -> int:
    """Numbers of a time embedding; of a transformer that has a slot."""
    module: Any = time_embedder(transformer)
    return module.linear_2.out_features
