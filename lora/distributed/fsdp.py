"""What FSDP 2 needs beside `accelerator.prepare`: the precision of a run, and layers that not every phase has."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What each `loop.mixed_precision` computes in."""


def plugin_of(accelerator: Accelerator) -> Any:
    """The settings of FSDP of a run, or None without it."""
    return getattr(accelerator.state, "fsdp_plugin", None)


def check_plugin(plugin: Any, mixed_precision: str) -> None:
    """Refuse FSDP 1 and accelerate's own activation checkpointing, and set the precision.

    accelerate's own policy casts what the model is given, so that a timestep of 901.3 arrives as 900, and sums the
    gradients of the processes in half precision. Here the inputs stay as they are, the operations choose their
    precision as they do without FSDP (see `autocast_forward`), and gradients are summed in float32.

    `accelerate launch` also asks transformers to load no weights but in the first process of a machine, which would be
    given to the others as they are split. Encoders are not split: each process encodes a share, and needs them whole.
    And accelerate's way to give weights on ends in an error for parameters that a model of diffusers has at its root,
    as Wan and LTX-Video do. So each process loads its models itself.

    accelerate's activation checkpointing puts a module around each block, whose name then stands in those of all
    weights: results would have names that nothing takes.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`; changed in place.
        mixed_precision: of `LoopSettings`.

    Raises:
        ConfigError: FSDP 1, or activation checkpointing.
    """
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ConfigError("FSDP 1 is not supported: set fsdp_version: 2 in the configuration of accelerate.")
    if getattr(plugin, "activation_checkpointing", False):
        raise ConfigError(
            "fsdp_activation_checkpointing is true in the configuration of accelerate, which renames the weights: set "
            "it to false, and loop.gradient_checkpointing to true."
        )
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    plugin.cpu_ram_efficient_loading = False  # read from there before
    if mixed_precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[mixed_precision], reduce_dtype=torch.float32, cast_forward_inputs=False
        )


@contextlib.contextmanager
def layers_of(plugin: Any, module: nn.Module) -> Iterator[list[str]]:
    """Let a phase shard by those of the named layers that its module has; others would be an error to accelerate.

    The plugin is one for all phases, and `prepare` writes into it, so it is as before afterwards.

    Args:
        plugin: accelerate's `FullyShardedDataParallelPlugin`.
        module: what is about to be prepared.

    Yields:
        Names of the classes that the module does not have.
    """
    names, policy = plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy
    present = {type(part).__name__ for part in module.modules()}
    try:
        if names is not None:
            plugin.transformer_cls_names_to_wrap = [name for name in names if name in present]
        yield [name for name in names or () if name not in present]
    finally:
        plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy = names, policy


def split(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Spread a module that is not trained over the processes, as `accelerator.prepare` spreads one that is.

    Args:
        accelerator: of a run under FSDP 2.
        module: in place; its forward pass must then be called in all processes.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    with layers_of(plugin_of(accelerator), module):
        return fsdp2_prepare_model(accelerator, module)


def autocast_forward(accelerator: Accelerator, module: nn.Module) -> None:
    """Run a module's forward under the autocast of the run, as accelerate does for all models but those of FSDP 2."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return inner(*args, **kwargs)

    module.forward = forward
