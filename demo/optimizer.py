"""Muon: momentum whose matrices are orthogonalised, with AdamW for everything that is not a matrix.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), and section 2.2 of "Muon
is scalable for LLM training" (arXiv 2502.16982) for the scale that lets both halves share one learning rate.
Convolution kernels count as matrices [out, in * kernel].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: a quintic Newton-Schulz iteration in bfloat16 on `[B, n, m]`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    transposed = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if transposed else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    x = x.to(matrices.dtype)
    return x.transpose(1, 2) if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions, AdamW for vectors and for the named exceptions.

    Args:
        named_parameters: as `module.named_parameters()` gives them.
        lr: one learning rate for both; a Muon update has a root mean square of 0.2 of it, as AdamW's typically has.
        exclude: parts of names of matrices that AdamW shall update (embeddings).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        exclude: tuple[str, ...] = ("embed_tokens", "shared", "relative_attention_bias"),
    ) -> None:
        matrices, others = [], []
        for name, parameter in named_parameters:
            if parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1 and not any(e in name for e in exclude):
                matrices.append(parameter)
            else:
                others.append(parameter)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas}
        super().__init__([{"params": matrices, "muon": True}, {"params": others, "muon": False}], defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = self._muon(parameters, group) if group["muon"] else [self._adam(p, group) for p in parameters]
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
        return loss

    def _muon(self, parameters: list[torch.Tensor], group: dict) -> list[torch.Tensor]:
        """Updates with Nesterov momentum; matrices of one shape are orthogonalised together."""
        by_shape: dict[torch.Size, list[int]] = {}
        directions = []
        for index, parameter in enumerate(parameters):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            directions.append(parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1))
            by_shape.setdefault(directions[-1].shape, []).append(index)
        updates: list[torch.Tensor] = [None] * len(parameters)
        for shape, indices in by_shape.items():
            stack = orthogonalise(torch.stack([directions[i] for i in indices])) * (0.2 * max(shape) ** 0.5)
            for i, update in zip(indices, stack, strict=True):
                updates[i] = update.view_as(parameters[i])
        return updates

    def _adam(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].lerp_(parameter.grad.square(), 1 - second)
        step = state["step"].item()
        mean = state["mean"] / (1 - first**step)
        return mean / ((state["square"] / (1 - second**step)).sqrt() + 1e-8)
