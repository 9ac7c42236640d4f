"""Optimisers and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .config import ConfigError
from .optional import optional
from .settings import PhaseSettings


def learning_rate(
    settings: PhaseSettings, step: int, seconds: float = 0.0, seconds_per_step: float | None = None
) -> float:
    """The learning rate of a step.

    Args:
        settings: of the phase.
        step: its number, from 0.
        seconds: how long the phase lasts by then.
        seconds_per_step: how long a step takes, from which follows where `max_minutes` will end the phase; None where
            that is not known yet.
    """
    peak = settings.learning_rate
    if step < settings.lr_warmup_steps:
        return peak * (step + 1) / settings.lr_warmup_steps
    if settings.lr_scheduler == "constant":
        left = 1.0
        if settings.lr_decay_steps:
            steps = float(settings.steps - step)
            if settings.max_minutes is not None and seconds_per_step:
                steps = min(steps, max(0.0, 60 * settings.max_minutes - seconds) / seconds_per_step)
            left = min(1.0, steps / settings.lr_decay_steps)
        return peak * (settings.min_lr_rate + (1 - settings.min_lr_rate) * left)
    done = (step - settings.lr_warmup_steps) / max(1, settings.steps - settings.lr_warmup_steps)
    if settings.max_minutes is not None:
        done = max(done, seconds / (60 * settings.max_minutes))
    done = min(1.0, done)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if settings.lr_scheduler == "cosine" else 1 - done
    return peak * (settings.min_lr_rate + (1 - settings.min_lr_rate) * fall)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has weight decay: the matrices and kernels of layers, and not vectors and tables.

    Tables of modulations are `[1, 6, dim]` in Wan and `[6, dim]` in LTX-Video and SANA, and norms of images and videos
    have `[C, 1, 1]`.
    """
    kernel = parameter.ndim == 2 or (parameter.ndim > 2 and parameter[0].numel() > 1)
    return kernel and name.endswith("weight")


def make_optimizer(
    settings: PhaseSettings, parameters: Mapping[str, nn.Parameter], scale: Callable[[str], float]
) -> torch.optim.Optimizer:
    """The optimiser of a phase; each group has the key `scale`, what the learning rate is multiplied by.

    Weight decay is for the matrices and kernels of layers alone, see `decays`.

    Raises:
        ConfigError: muon or prodigy for parameters whose learning rates have different scales, or a package that is not
            installed.
    """
    groups: dict[tuple[float, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((scale(name), decays(name, parameter)), {})[name] = parameter
    if settings.optimizer in ONE_RATE and len({factor for factor, _ in groups}) > 1:
        raise ConfigError(f"{settings.optimizer} has one learning rate for all parameters: use adamw for this phase.")
    if settings.optimizer == "muon":
        from ..demo.optimizer import MuonWithAdamW

        factor = next(iter(groups))[0]
        optimizer = MuonWithAdamW(
            parameters.items(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            decays=decays,
        )
        for group in optimizer.param_groups:
            group["scale"] = factor
        return optimizer
    listed = [
        {
            "params": list(members.values()),
            "weight_decay": settings.weight_decay if decayed else 0.0,
            "scale": factor,
        }
        for (factor, decayed), members in groups.items()
    ]
    cls: Any = torch.optim.AdamW if settings.optimizer == "adamw" else of_package(settings.optimizer)
    return cls(listed, lr=settings.learning_rate, betas=settings.betas, **OPTIONS.get(settings.optimizer, {}))


ONE_RATE = ("muon", "prodigy")
"""Optimisers with one learning rate for all parameters."""

OF_PACKAGES = {
    "adamw_8bit_torchao": ("torchao.optim", "AdamW8bit"),
    "adamw_fp8_torchao": ("torchao.optim", "AdamWFp8"),
    "adamw_4bit_torchao": ("torchao.optim", "AdamW4bit"),
    "adamw_8bit_bitsandbytes": ("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": ("prodigyopt", "Prodigy"),
}
"""Name of an optimiser of a package that may be missing -> the module that has it, and its class there."""

# As its authors advise for adapters; without the first, a warm-up would have the rate overestimated.
OPTIONS = {"prodigy": {"safeguard_warmup": True, "use_bias_correction": True}}


def of_package(name: str, phase: str = "") -> Any:
    """The class of an optimiser in `OF_PACKAGES`. To load it also lets torch read the checkpoints that hold its state.

    Args:
        name: of the optimiser.
        phase: whose it is, for the message.

    Raises:
        ConfigError: its package is not installed.
    """
    of_phase = f"phase {phase}: " if phase else ""
    module, cls = OF_PACKAGES[name]
    return getattr(optional(module, f"{of_phase}optimizer is {name}"), cls)


def clip_gradients(
    accelerator: Any, named: Mapping[str, nn.Parameter], part: Callable[[str], str], bound: float
) -> dict[str, torch.Tensor]:
    """Bound the norm of the gradients of each part of a model by itself.

    Args:
        accelerator: of the run.
        named: what is trained.
        part: of a parameter's name, see `Phase.clipped_with`.
        bound: of each norm.

    Returns:
        The norms before, by "gradient_norm" and "gradient_norm_PART".
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        parts.setdefault(part(name), []).append(parameter)
    if len(parts) == 1:
        [(name, parameters)] = parts.items()
        norms = {name: accelerator.clip_grad_norm_(parameters, bound)}
    else:
        accelerator.unscale_gradients()  # once: in float16 a second time is an error
        norms = {name: nn.utils.clip_grad_norm_(parameters, bound) for name, parameters in parts.items()}
    return {f"gradient_norm_{name}" if name else "gradient_norm": norm for name, norm in norms.items()}


def found_rate(optimizer: torch.optim.Optimizer) -> float:
    """The factor on learning rates that an optimiser has found so far; 1 of those that seek none."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    return float(inner.param_groups[0].get("d", 1.0))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times its `scale`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # of torchao, which compiles its step
            group["lr"].fill_(rate * group["scale"])
        else:
            group["lr"] = rate * group["scale"]
