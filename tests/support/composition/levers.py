"""What else people do to a transformer: adapters, fused projections, offloading, low bits, caches, compiled blocks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import accelerate as hf_accelerate
import torch
from diffusers import CacheMixin, FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks._helpers import TransformerBlockRegistry
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from tiny_families import Tiny

from vidaccel.pipelines import find_transformers

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Lever:
    """One of them.

    Args:
        name: the column of the table.
        what: the calls, for the text above the table.
        apply: does it to a tiny model.
        missing: why a class of models has no such thing; empty where it has.
        same_as: gives a fresh model, from one with the lever at work, the weights that it stands for, where they are
            not its own. Sparse attention must make the same of both.
        exact: bit for bit.
        package: the optional package that it comes from.
        caches: later forward passes leave layers out.
        lazy: it does its work at the first call, slowly, so there is one order, and it is not tried without vidaccel.
    """

    name: str
    what: str
    apply: Callable[[Tiny], None]
    missing: Callable[[torch.nn.Module], str] = lambda model: ""
    same_as: Callable[[torch.nn.Module, torch.nn.Module], None] | None = None
    exact: bool = True
    package: str = ""
    caches: bool = False
    lazy: bool = False

    @property
    def installed(self) -> bool:
        return not self.package or importlib.util.find_spec(self.package) is not None


def projections(tiny: Tiny) -> list[str]:
    """Paths of the linear layers in the self-attention over the video."""
    ((model, family),) = find_transformers(tiny.model).values()
    return [
        f"{path}.{inner}"
        for path, module in family.modules(model).items()
        for inner, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear)
    ]


def lora(tiny: Tiny) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=projections(tiny), init_lora_weights=False)
    if hasattr(tiny.model, "add_adapter"):
        tiny.model.add_adapter(config)
    else:
        inject_adapter_in_model(config, tiny.model)
    tiny.model.requires_grad_(False)


def merged(model: torch.nn.Module, fresh: torch.nn.Module) -> None:
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            fresh.get_submodule(path).weight.data += layer.get_delta_weight("default")


def no_fusing(model: torch.nn.Module) -> str:
    return "" if hasattr(model, "fuse_qkv_projections") else "the class has no fuse_qkv_projections"


def model_offload(tiny: Tiny) -> None:
    """The hook of `enable_model_cpu_offload`, set on each model of a pipeline, which needs an accelerator."""
    hf_accelerate.cpu_offload_with_hook(tiny.model, execution_device=CPU)


def sequential_offload(tiny: Tiny) -> None:
    """What `enable_sequential_cpu_offload` does: weights are on `meta` between calls."""
    hf_accelerate.cpu_offload(tiny.model, execution_device=CPU)
    assert all(parameter.is_meta for parameter in tiny.model.parameters())


def group_offload(kind: str) -> Callable[[Tiny], None]:
    def apply(tiny: Tiny) -> None:
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        tiny.model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)

    return apply


def layerwise_casting(tiny: Tiny) -> None:
    tiny.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert all(tiny.model.get_submodule(path).weight.dtype == torch.float8_e4m3fn for path in projections(tiny))


def rounded(model: torch.nn.Module, fresh: torch.nn.Module) -> None:
    stored = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        parameter.data.copy_(stored[name].data)


def torchao_int8(tiny: Tiny) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # Only the attention: some models read the dtype of other weights.
    paths = set(projections(tiny))
    quantize_(tiny.model, Int8WeightOnlyConfig(), filter_fn=lambda module, path: path in paths)
    assert all(type(tiny.model.get_submodule(path).weight.data) is not torch.Tensor for path in paths)


def dequantised(model: torch.nn.Module, fresh: torch.nn.Module) -> None:
    stored = dict(model.named_parameters())
    for name, parameter in fresh.named_parameters():
        if hasattr(stored[name], "dequantize") and type(stored[name].data) is not torch.Tensor:
            parameter.data.copy_(stored[name].dequantize())


def cache(config: Callable[[], object]) -> Callable[[Tiny], None]:
    def apply(tiny: Tiny) -> None:
        for metadata in TransformerBlockRegistry._registry.values():
            metadata._cached_parameter_indices = None  # where a block does not fit, its second call fails otherwise
        tiny.model.enable_cache(config())

    return apply


def first_block() -> FirstBlockCacheConfig:
    return FirstBlockCacheConfig(threshold=1e3)


def mag() -> MagCacheConfig:
    ratios = {"num_inference_steps": 5, "mag_ratios": [1.0] * 5}
    return MagCacheConfig(threshold=10.0, max_skip_steps=2, retention_ratio=0.0, **ratios)


def broadcast() -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=3, current_timestep_callback=lambda: 500)


def no_caching(model: torch.nn.Module) -> str:
    return "" if isinstance(model, CacheMixin) else "the class has no enable_cache"


def compiled_blocks(tiny: Tiny) -> None:
    torch._dynamo.reset()
    tiny.model.compile_repeated_blocks(fullgraph=True, backend="eager")


def no_compiling(model: torch.nn.Module) -> str:
    return "" if model._repeated_blocks else "the class names no repeated blocks"


def cache_dit(tiny: Tiny) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=1e3,
        num_inference_steps=5,
    )  # fmt: skip
    cache_dit.enable_cache(tiny.model, cache_config=config)


_CACHE = {"missing": no_caching, "caches": True}
_ALL = (
    Lever("LoRA", "`add_adapter` on the attention's projections", lora, same_as=merged, exact=False),
    Lever("fused qkv", "`fuse_qkv_projections`", lambda t: t.model.fuse_qkv_projections(), no_fusing, exact=False),
    Lever("model offload", "the hook of `enable_model_cpu_offload`", model_offload),
    Lever("sequential offload", "the hooks of `enable_sequential_cpu_offload`", sequential_offload),
    Lever("group offload", "`enable_group_offload`, by blocks", group_offload("block_level")),
    Lever("leaf offload", "`enable_group_offload`, by leaves", group_offload("leaf_level")),
    Lever("fp8 storage", "`enable_layerwise_casting` with float8_e4m3fn", layerwise_casting, same_as=rounded),
    Lever(
        "int8",
        "torchao's `Int8WeightOnlyConfig` on the attention",
        torchao_int8,
        same_as=dequantised,
        exact=False,
        package="torchao",
    ),
    Lever("first-block cache", "`enable_cache(FirstBlockCacheConfig)`", cache(first_block), **_CACHE),
    Lever("MagCache", "`enable_cache(MagCacheConfig)`", cache(mag), **_CACHE),
    Lever("broadcast", "`enable_cache(PyramidAttentionBroadcastConfig)`", cache(broadcast), **_CACHE),
    Lever("cache-dit", "`cache_dit.enable_cache`", cache_dit, package="cache_dit", caches=True),
    Lever(
        "compiled blocks",
        "`compile_repeated_blocks(fullgraph=True)`",
        compiled_blocks,
        no_compiling,
        exact=False,
        lazy=True,
    ),
)
LEVERS: dict[str, Lever] = {lever.name: lever for lever in _ALL}
