"""Linear layers whose matrix products are computed in 8 bits, forward and backward, through torchao.

Weights, gradients and the inputs that are kept for the backward pass stay as they are; what is multiplied is rounded
anew in each step, so this saves time where the hardware has such products, and no memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import ConfigError
from ..optional import optional

MULTIPLE = 16
"""Both sides of a matrix must be a multiple of this: kernels of 8-bit products take no other."""
_FLOAT8 = "torchao.float8"
_INT8 = "torchao.prototype.quantized_training"


def linears_of_blocks(module: nn.Module) -> list[str]:
    """The linear layers that are computed in low bits: names of those of repeated blocks with full-size matrices.

    Not the first and last layers of a model, the LoRA, and those of norms, which see one row a clip.

    Args:
        module: what is trained.
    """
    lists = {name for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    found = []
    for name, layer in module.named_modules():
        path = name.split(".")
        within = any(".".join(path[:end]) in lists for end in range(1, len(path)))
        aside = ".lora_" in name or any(part.startswith("norm") for part in path)
        if isinstance(layer, nn.Linear) and within and not aside and not any(s % MULTIPLE for s in layer.weight.shape):
            found.append(name)
    return found


def check_some(module: nn.Module, kind: str, phase: str) -> list[str]:
    """The names of `linears_of_blocks`, of which there must be some.

    Args:
        module: what is trained, with or without weights.
        kind, phase: as those of `in_low_bits`.

    Raises:
        ConfigError: there are none.
    """
    names = linears_of_blocks(module)
    if not names:
        raise ConfigError(
            f"phase {phase}: low_bit_linears is {kind}, but what it trains has no linear layers in blocks whose sides "
            f"are multiples of {MULTIPLE}: leave it out."
        )
    return names


def in_low_bits(module: nn.Module, kind: str, phase: str) -> int:
    """Let the linear layers of a module's blocks compute in low bits; names of parameters stay as they are.

    Args:
        module: what is trained, changed in place.
        kind: of `PhaseSettings.low_bit_linears`.
        phase: whose it is, for the message.

    Returns:
        How many layers there are.

    Raises:
        ConfigError: the module has no such layer, or torchao is missing.
    """
    names = check_some(module, kind, phase)
    convert = _converter(kind, f"phase {phase}: low_bit_linears is {kind}")
    for name in names:
        parent, _, own = name.rpartition(".")
        layer = convert(module.get_submodule(name))
        layer.register_forward_pre_hook(_taken)
        layer.register_forward_hook(_given_on)
        setattr(module.get_submodule(parent), own, layer)
    return len(names)


def check_linears(kind: str, phase: str, device: torch.device) -> None:
    """Compute one small layer, forward and backward, where the training will run.

    Args:
        kind, phase: as those of `in_low_bits`.
        device: of the training.

    Raises:
        ConfigError: torchao is missing, or the machine has no such products.
    """
    if kind == "none":
        return
    told = f"phase {phase}: low_bit_linears is {kind}"
    probe = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(MULTIPLE, MULTIPLE)])}).to(device)
    in_low_bits(probe, kind, phase)
    layer: Any = probe["blocks"]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        layer[0](torch.ones(33, MULTIPLE, device=device, dtype=dtype, requires_grad=True)).float().sum().backward()
    except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"{told}, which this machine cannot compute on {_named(device)}: {first} (fp8 needs a GPU of compute "
            "capability 8.9 or later.) Set it to none."
        ) from error


def _named(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def _converter(kind: str, told: str) -> Any:
    """What makes of a linear layer one of low bits, with the same parameters."""
    if kind == "int8":
        module = optional(_INT8, told)
        quantize: Any = optional("torchao.quantization", told).quantize_
        # Whole layers, not tensors of a type of their own: checkpoints, EMA and optimisers see plain weights.
        config = module.Int8MixedPrecisionTrainingConfig(module_swap=True)

        def convert(layer: nn.Module) -> nn.Module:
            quantize(layer, config, filter_fn=lambda found, name: found is layer)
            return layer

        return convert
    module = optional(_FLOAT8, told)
    config = module.Float8LinearConfig.from_recipe_name(kind.removeprefix("fp8_"))
    # The tokens of a clip are what the gradients of weights are summed over, and no multiple of 16.
    config = replace(config, pad_inner_dim=True)

    return lambda layer: module.convert_to_float8_training(layer, config=config)


def _taken(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The input of a layer in the type of the autocast, for which torchao looks on GPUs alone, and without gaps."""
    inputs, *rest = given
    if torch.is_autocast_enabled(inputs.device.type):
        inputs = inputs.to(torch.get_autocast_dtype(inputs.device.type))
    return (inputs.contiguous(), *rest)


def _given_on(layer: nn.Module, given: tuple[Any, ...], made: torch.Tensor) -> torch.Tensor:
    """The output in the type of the input, which a bias in float32 would widen; its gradient comes without gaps, which
    torchao takes for granted.
    """
    if made.requires_grad:
        made.register_hook(torch.Tensor.contiguous)
    return made.to(given[0].dtype)
