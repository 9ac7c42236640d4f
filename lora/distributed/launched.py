"""What `accelerate launch` may ask for that this trainer does not do: refused in words before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..config import ConfigError
from .fsdp import plugin_of

if TYPE_CHECKING:
    from accelerate import Accelerator

_KNOWN = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
"""Ways of accelerate to use devices that checkpoints, gradients and stops are written for."""
_OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
_INSTEAD = (
    "start it on several GPUs with --multi_gpu, or, to spread the weights over them, with --use_fsdp --fsdp_version 2."
)


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse what accelerate would need a package for that may not be here, and would say so in its own words.

    Args:
        environment: of the process, as `accelerate launch` sets it.

    Raises:
        ConfigError: DeepSpeed or Megatron-LM.
    """
    for variable, name in _OTHERS.items():
        if environment.get(variable, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"the configuration of accelerate asks for {name} ({variable}), not supported: {_INSTEAD}"
            )


def check_accelerator(accelerator: Accelerator, sparse: bool = False) -> None:
    """Refuse what the loop would run wrongly.

    Args:
        accelerator: of the run. sparse: it trains with sparse attention.

    Raises:
        ConfigError: devices that are used in another way than `_KNOWN`; a model that is split by its matrices or
            sequences; or compilation of which results would have other names, or that was never tried.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in _KNOWN:
        raise ConfigError(f"the configuration of accelerate asks for {kind}, not supported: {_INSTEAD}")
    parallel = getattr(accelerator.state, "parallelism_config", None)
    for name, what in (("tp_enabled", "tensor"), ("cp_enabled", "context"), ("sp_enabled", "sequence")):
        if getattr(parallel, name, False):
            raise ConfigError(f"the configuration of accelerate asks for {what} parallelism, not supported: {_INSTEAD}")
    dynamo = accelerator.state.dynamo_plugin
    backend = str(getattr(dynamo.backend, "value", dynamo.backend)).lower()
    if backend == "no":
        return
    if sparse:
        raise ConfigError(
            f"the configuration of accelerate asks for the dynamo backend {backend}, and the run trains with sparse "
            "attention, which has no gradients in compiled models: set dynamo_backend to no."
        )
    if dynamo.use_regional_compilation:
        raise ConfigError(
            "the configuration of accelerate asks for regional compilation, which copies the model and renames its "
            "weights: set dynamo_use_regional_compilation to false, and the model is compiled as a whole."
        )
    if plugin_of(accelerator) is not None:
        raise ConfigError(
            f"the configuration of accelerate asks for the dynamo backend {backend} under FSDP, which was never tried: "
            "set dynamo_backend to no."
        )
