"""A phase's module and optimiser as accelerate wraps them: for one process, several, or weights that are spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...pipelines.presets.compiling import CompiledBlocks
from ...pipelines.presets.levers import Compile
from ..footprint.memory import blocks_of
from ..recipes.base import Phase
from .fsdp import autocast_forward, layers_of, plugin_of, split

if TYPE_CHECKING:
    from accelerate import Accelerator


def prepare(
    accelerator: Accelerator,
    phase: Phase,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
    compiled: bool = False,
) -> tuple[Any, Any]:
    """Module and optimiser, wrapped; and the phase's teachers, put beside them.

    Args:
        accelerator: of the run.
        phase: whose they are.
        module, optimizer: what `Phase.setup` gave, and of its parameters.
        say: tells the user a sentence.
        compiled: the repeated blocks of the module are compiled, each when it is first called. In place, so that names
            and hooks stay.
    """
    if compiled and (blocks := blocks_of(module)):
        CompiledBlocks(blocks, Compile(), below_hooks=False)
        say(f"phase {phase.name}: {len(blocks)} blocks are compiled, which makes the first steps long.")
    plugin = plugin_of(accelerator)
    for teacher in phase.teachers():
        if plugin is None:
            teacher.to(accelerator.device)
        else:
            split(accelerator, teacher)
    if plugin is None:
        _leave_alone([name for name, p in module.named_parameters() if not p.requires_grad], module)
        return accelerator.prepare(module, optimizer)
    autocast_forward(accelerator, module)
    with layers_of(plugin, module) as absent:
        if absent:
            say(f"phase {phase.name} has no {', '.join(absent)}: FSDP does not split by it.")
        return accelerator.prepare(module, optimizer)


def _leave_alone(frozen: list[str], module: nn.Module) -> None:
    """Let several processes not give one another what is not trained: each has loaded the same files, and quantised
    weights cannot be sent."""
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
