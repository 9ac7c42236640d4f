"""A model that was moved to another autoencoder: its new ends, and adapter-only weights loaded onto their base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from ..locations import named_autoencoder
from .adapter_folder import FULL_FILE, LORA_FILE, LORA_PREFIX, AdapterError, base_location, read_facts
from .published_files import find_autoencoder, hub_options, load_autoencoder

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, nn.Conv3d)


def started_anew(embedding: Layer) -> Layer:
    """A new embedder of one token a latent pixel, as it starts: Xavier, and no bias. Changed in place."""
    nn.init.xavier_uniform_(embedding.weight.data.flatten(1))
    nn.init.zeros_(embedding.bias)
    return embedding


def zero_head(inner: int, channels: int, dtype: torch.dtype | None = None) -> nn.Linear:
    """A new head, `[..., inner] -> [..., channels]`, as it starts: zero."""
    head = nn.Linear(inner, channels, dtype=dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def new_embedding(channels: int, inner: int) -> nn.Conv3d:
    """A patch embedding for patches of (1, 1, 1): `[B, channels, T, H, W] -> [B, inner, T, H, W]`."""
    return started_anew(nn.Conv3d(channels, inner, kernel_size=1))


def retarget(transformer: WanTransformer3DModel, in_channels: int, out_channels: int) -> WanTransformer3DModel:
    """Give a Wan transformer a new embedder and a head that starts at zero, for latents with patches of (1, 1, 1)."""
    inner, dtype = transformer.proj_out.in_features, transformer.proj_out.weight.dtype
    transformer.patch_embedding = new_embedding(in_channels, inner).to(dtype)
    transformer.proj_out = zero_head(inner, out_channels, dtype)
    transformer.rope.patch_size = (1, 1, 1)
    transformer.register_to_config(patch_size=(1, 1, 1), in_channels=in_channels, out_channels=out_channels)
    return transformer


def load_adapter(transformer: Any, folder: Path) -> Any:
    """Load an adapter into a transformer that `retarget` has prepared; its LoRA stays apart.

    Raises:
        AdapterError: it belongs to a model of another shape, or lacks a part of embedder or head.
    """
    from safetensors.torch import load_file

    facts = read_facts(folder)
    own = dict(transformer.named_parameters())
    full = load_file(folder / FULL_FILE)
    missing = sorted(name for name in own if name.startswith(("patch_embedding.", "proj_out.")) and name not in full)
    if missing:
        raise AdapterError(
            f"{folder / FULL_FILE} lacks {', '.join(missing)}, which start at random or at zero: it was not written as "
            "a whole; write or download the adapter again."
        )
    for name, value in full.items():
        if name not in own or own[name].shape != value.shape:
            there = list(own[name].shape) if name in own else "absent"
            raise AdapterError(
                f"{folder}: {name} is {list(value.shape)} in the adapter and {there} in the model; it was made for "
                f"{facts['base']} with {facts['autoencoder']}."
            )
        with torch.no_grad():
            own[name].copy_(value)
    if facts["lora"]:
        transformer.load_lora_adapter(folder, weight_name=LORA_FILE, prefix=LORA_PREFIX)
    return transformer


def adapted_transformer(folder: Path, base: str, dtype: torch.dtype | None = None, **hub: Any) -> WanTransformer3DModel:
    """The transformer of a base with the adapter in a folder, its LoRA merged.

    Args:
        folder: with the adapter.
        base: folder or hub id of the pipeline that it is for.
        dtype: of the weights.
        hub: how to reach the hub, as arguments of `from_pretrained`.

    Raises:
        AdapterError: it does not fit the base.
        OSError: the base is not there.
    """
    facts = read_facts(folder)
    config = facts["transformer"]
    transformer = WanTransformer3DModel.from_pretrained(base, subfolder="transformer", dtype=dtype, **hub)
    if len(transformer.blocks) != config["num_layers"]:
        raise AdapterError(
            f"{folder} belongs to a model of {config['num_layers']} layers, and {base} has {len(transformer.blocks)}: "
            f"give the model it was made from, {facts['base']}, with base=."
        )
    retarget(transformer, config["in_channels"], config["out_channels"])
    load_adapter(transformer, folder)
    if facts["lora"]:
        transformer.fuse_lora()
        transformer.unload_lora()
    return transformer.eval()


def own_autoencoder(folder: Path, stated: str) -> str:
    """Folder or hub id of the autoencoder that an adapter was made for."""
    own = folder / "vae"
    found = str(own) if own.is_dir() else named_autoencoder(folder, stated)
    if found is None:
        raise AdapterError(
            f"{folder} was made for the autoencoder in {stated}, which is not there: give its folder with autoencoder=."
        )
    return found


def load_adapted(
    pipeline_class: Any,
    folder: Path,
    base: str | Path | None = None,
    autoencoder: str | Path | None = None,
    autoencoder_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A pipeline from adapter-only weights and the base model they belong to, the LoRA merged.

    Args:
        pipeline_class: `DCVideoGenPipeline` or `DCVideoGenImageToVideoPipeline`.
        folder: with the adapter.
        base, autoencoder: instead of those that the adapter names.
        autoencoder_config: see `published_files.load_autoencoder`.
        options: of `from_pretrained` for the base pipeline, such as `dtype`, or components, such as `vae`.

    Raises:
        AdapterError: it does not fit the base model.
        LayoutError: the autoencoder is not there.
        OSError: the base model is not there.
    """
    if "transformer" in options:
        raise AdapterError(
            f"{folder} is an adapter, which changes the transformer of its base: give the base with base=, not "
            "transformer=."
        )
    if options.get("quantization_config") is not None:
        raise AdapterError(
            f"{folder} is an adapter, which is merged into the weights of its base: load it without "
            "quantization_config, save_pretrained the pipeline once, and load that with it."
        )
    device_map = options.pop("device_map", None)
    if isinstance(device_map, dict) or device_map in ("balanced", "auto"):
        raise AdapterError(
            f"{folder} is an adapter, merged before its parts can be spread: device_map is {device_map!r}, give a "
            "device such as 'cuda', or save_pretrained the pipeline once and load that with it."
        )
    facts = read_facts(folder)
    location = base_location(str(base if base is not None else facts["base"]))
    dtype = options.get("dtype", options.get("torch_dtype"))
    of = (lambda name: dtype.get(name, dtype.get("default"))) if isinstance(dtype, dict) else (lambda name: dtype)
    if "vae" in options:
        vae = options.pop("vae")
    else:
        place = find_autoencoder(autoencoder or own_autoencoder(folder, facts["autoencoder"]), hub_options(options))
        vae = load_autoencoder(place, of("vae"), autoencoder_config)
    hub = hub_options(options, "revision", "variant", "use_safetensors")
    transformer = adapted_transformer(folder, location, of("transformer"), **hub)
    if base is None:  # else it does not follow from the folder what the weights are
        transformer.register_to_config(_name_or_path=str(folder))
    # Through diffusers' own class, because the base is one of its pipelines.
    stock = next(c for c in pipeline_class.__mro__ if c.__module__.startswith("diffusers."))
    parts = stock.from_pretrained(location, transformer=None, vae=None, **options).components
    pipe = pipeline_class(**{**parts, "transformer": transformer, "vae": vae})
    return pipe if device_map is None else pipe.to(device_map)
