"""`torch.optim.Muon` for matrices and convolution kernels, `torch.optim.AdamW` for the rest, as one optimiser.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), and section 2.2 of "Muon
is scalable for LLM training" (arXiv 2502.16982) for the scale that lets both halves share one learning rate. torch's
Muon takes matrices alone, so kernels are shown to it as [out, in * kernel]. The built-in models were trained with an
implementation of the same formulas that orthogonalised matrices of one shape together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions, AdamW for vectors and for the named exceptions.

    Args:
        named_parameters: as `module.named_parameters()` gives them.
        lr: one learning rate for both; a Muon update has a root mean square of 0.2 of it, as AdamW's typically has.
        exclude: parts of names of matrices that AdamW shall update (embeddings).
        decays: which parameters have weight decay, by name and value; the others are AdamW's, matrices too, as tables
            of modulations are. None for all.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        exclude: tuple[str, ...] = ("embed_tokens", "shared", "relative_attention_bias"),
        decays: Callable[[str, nn.Parameter], bool] | None = None,
    ) -> None:
        matrices, others, undecayed = [], [], []
        for name, parameter in named_parameters:
            if decays is not None and not decays(name, parameter):
                undecayed.append(parameter)
            elif parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1 and not any(e in name for e in exclude):
                matrices.append(parameter)
            else:
                others.append(parameter)
        common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        # What Muon sees of each matrix: a view of two dimensions, renewed in each step, since a model may be moved.
        self._flat = {parameter: nn.Parameter(parameter.detach().flatten(1)) for parameter in matrices}
        self._inner: list[torch.optim.Optimizer] = []
        if matrices:
            scaled: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            self._inner.append(torch.optim.Muon(list(self._flat.values()), **common, **scaled))
        groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
        for part, decay in ((others, weight_decay), (undecayed, 0.0)):
            if part:
                self._inner.append(torch.optim.AdamW(part, lr=lr, weight_decay=decay, betas=betas))
                groups.append({"params": part, "weight_decay": decay})
        super().__init__(groups, common)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for parameter, flat in self._flat.items():
            flat.data = parameter.data.flatten(1)
            flat.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for group, inner in zip(self.param_groups, self._inner, strict=True):
            inner.param_groups[0].update(lr=group["lr"], weight_decay=group["weight_decay"])
            inner.step()
            for parameter in group["params"]:
                self.state[parameter] = inner.state[self._flat.get(parameter, parameter)]
        for parameter, flat in self._flat.items():
            if flat.data_ptr() != parameter.data_ptr():  # not contiguous, so that it was a copy
                parameter.copy_(flat.view_as(parameter))
            flat.grad = None
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimiser; the tensors of the state are those of the inner ones."""
        super().load_state_dict(state_dict)
        for group, inner in zip(self.param_groups, self._inner, strict=True):
            for parameter in group["params"]:
                if parameter in self.state:
                    inner.state[self._flat.get(parameter, parameter)] = self.state[parameter]
