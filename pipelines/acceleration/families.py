"""What differs between model families, as data: the next family is one `ModelSpec` here and one attention processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...attention import SparseAttention, VideoLayout
from .wan_attention import SparseWanAttnProcessor


@dataclass(frozen=True)
class ModelSpec:
    """One family of video transformers.

    Args:
        family: its name in messages and tables.
        transformers: class names of the transformers it describes.
        pipelines: diffusers pipelines that were tried with it; others with such a transformer work too.
        blocks: attribute that holds the transformer blocks.
        self_attention: attribute of a block that holds its self-attention.
        processor: `(engine, layer, replaced processor) -> processor` with the sparse call.
        layout: `(transformer, hidden_states) -> VideoLayout` of the sequence its blocks see.
        branches: names of the guidance branches in the order in which the pipeline calls them.
        timestep: the argument of `forward` that changes from step to step.
    """

    family: str
    transformers: tuple[str, ...]
    pipelines: tuple[str, ...]
    blocks: str
    self_attention: str
    processor: Callable[[SparseAttention, int, object], object]
    layout: Callable[[torch.nn.Module, torch.Tensor], VideoLayout]
    branches: tuple[str, ...]
    timestep: str = "timestep"

    def processor_names(self, transformer: torch.nn.Module) -> list[str]:
        """Keys of the self-attention processors in `transformer.attn_processors`, by layer."""
        count = len(getattr(transformer, self.blocks))
        return [f"{self.blocks}.{layer}.{self.self_attention}.processor" for layer in range(count)]


def patch_grid(transformer: Any, hidden_states: torch.Tensor) -> VideoLayout:
    """The grid of latents `[B, C, frames, height, width]` cut into the transformer's patches, without text."""
    sizes = hidden_states.shape[2:]
    return VideoLayout(*(size // patch for size, patch in zip(sizes, transformer.config.patch_size, strict=True)))


WAN = ModelSpec(
    family="Wan 2.1 / 2.2",
    transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    pipelines=(
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "WanVACEPipeline",
        "DCVideoGenPipeline",
        "DCVideoGenImageToVideoPipeline",
    ),
    blocks="blocks",
    self_attention="attn1",
    processor=SparseWanAttnProcessor,
    layout=patch_grid,
    branches=("cond", "uncond"),
)

SPECS: tuple[ModelSpec, ...] = (WAN,)


def supported_pipelines() -> list[str]:
    """Names of the diffusers pipelines that `accelerate` knows."""
    return sorted(name for spec in SPECS for name in spec.pipelines)


def unwrap(component: Any) -> Any:
    """The model inside the wrappers that training and compilation put round one.

    Raises:
        RuntimeError: a `DataParallel` over several devices.
    """
    while True:
        if isinstance(component, torch.nn.DataParallel) and len(component.device_ids) > 1:
            raise RuntimeError(
                f"DataParallel runs copies of the model in threads on {len(component.device_ids)} devices, which would "
                "share what sparse attention remembers: use DistributedDataParallel, or a process for each device."
            )
        if isinstance(component, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            component = component.module
        elif hasattr(component, "_orig_mod"):  # torch.compile
            component = component._orig_mod
        elif callable(getattr(component, "get_base_model", None)):  # PEFT
            component = component.get_base_model()
        else:
            return component


def find_transformers(pipe: object) -> dict[str, tuple[torch.nn.Module, ModelSpec]]:
    """The transformers of a pipeline that have a spec, by component name.

    Args:
        pipe: a diffusers pipeline, or one transformer. What `torch.compile`, PEFT, DDP and `DataParallel` wrap
            round a transformer is looked through.

    Raises:
        TypeError: there is none; names the supported pipelines.
        RuntimeError: a `DataParallel` over several devices.
    """
    components = getattr(pipe, "components", None) or {"transformer": pipe}
    by_class = {name: spec for spec in SPECS for name in spec.transformers}
    found = {}
    for name, component in components.items():
        component = unwrap(component)
        # Through the whole inheritance, so that a subclass of a known transformer is one.
        spec = next((by_class[c.__name__] for c in type(component).__mro__ if c.__name__ in by_class), None)
        if spec is not None:
            found[name] = (component, spec)
    if not found:
        raise TypeError(
            f"{type(pipe).__name__} has no transformer that vidaccel knows. Supported pipelines: "
            f"{', '.join(supported_pipelines())}."
        )
    return found
