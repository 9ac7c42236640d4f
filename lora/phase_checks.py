"""What phases ask for that this run cannot do: told for all of them before the first one is prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..attention.code_generator import missing
from .config import ConfigError
from .footprint.low_bit import check_linears, check_some
from .footprint.memory import blocks_of
from .optim import OF_PACKAGES, of_package
from .recipes.base import Phase


def check_phase(phase: Phase, device: torch.device, sharded: bool) -> None:
    """Raise ConfigError where a phase needs a package, a product in low bits or whole weights that are not there.

    Args:
        phase: any of the run, also one that comes after hours of others.
        device: of the training.
        sharded: the weights are spread over the processes (FSDP).
    """
    settings = phase.settings
    if settings.optimizer in OF_PACKAGES:
        of_package(settings.optimizer, phase.name)
    check_linears(settings.low_bit_linears, phase.name, device)
    if sharded:
        _check_sharded(phase)


def check_names(phases: Sequence[Phase]) -> None:
    """Raise ConfigError for two phases of one name, under which checkpoints and logs tell them apart."""
    names = [phase.name for phase in phases]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ConfigError(f"the recipe has two phases of the name {twice[0]}: give each a name of its own.")


def check_loss(phase: str, made: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """What `Phase.loss` returned, the loss and the numbers beside it.

    Args:
        phase: its name.

    Raises:
        TypeError: it is something else; says what it must be.
    """
    wrong = ""
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], Mapping):
        wrong = f"a {type(made).__name__}"
    elif not isinstance(made[0], torch.Tensor) or made[0].numel() != 1:
        wrong = f"a loss of shape {list(made[0].shape)}" if isinstance(made[0], torch.Tensor) else f"{made[0]!r}"
    elif others := [name for name, value in made[1].items() if not isinstance(value, torch.Tensor)]:
        wrong = f"{made[1][others[0]]!r} for {others[0]}"
    if wrong:
        must = "(loss, numbers), the mean loss as a tensor of one number, and by name those for the log, each a tensor"
        raise TypeError(f"loss of the phase {phase} returned {wrong}: it must return {must}.")
    return made


def check_outline(phase: Phase) -> None:
    """Raise ConfigError where what a phase trains has no layer that its settings are about; after `Recipe.prepare`."""
    kind = phase.settings.low_bit_linears
    if kind != "none" and (outline := phase.outline()) is not None:
        check_some(outline, kind, phase.name)


def check_compiler(device: torch.device, sharded: bool) -> None:
    """Raise ConfigError where blocks cannot be compiled, which `loop.compile` asks for."""
    if why := missing(device):
        raise ConfigError(f"loop.compile is true, but torch's compiler {why}.")
    if sharded:
        raise ConfigError("loop.compile is true under FSDP, which was never tried: set it to false.")


def check_some_compile(phases: Sequence[Phase]) -> None:
    """Raise ConfigError where no phase trains anything with repeated blocks; after `Recipe.prepare`."""
    outlines = [phase.outline() for phase in phases]
    if not any(outline is None or blocks_of(outline) for outline in outlines):
        raise ConfigError("loop.compile is true, but what is trained has no repeated blocks: set it to false.")


def _check_sharded(phase: Phase) -> None:
    optimizer = phase.settings.optimizer
    if optimizer == "muon":
        raise ConfigError(
            f"phase {phase.name}: optimizer is muon, which needs whole matrices, and FSDP splits them: set it to adamw."
        )
    if optimizer in OF_PACKAGES:
        raise ConfigError(
            f"phase {phase.name}: optimizer is {optimizer}, whose state this trainer cannot gather under FSDP: set it "
            "to adamw."
        )
    if phase.whole_weights:
        raise ConfigError(f"{phase.whole_weights}, which FSDP splits: train without FSDP, or leave it out.")
