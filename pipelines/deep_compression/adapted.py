"""A model that was moved to another autoencoder: its new ends, and adapter-only weights loaded onto their base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from ...autoencoders.checkpoint_file import variant_in
from ..errors import few_of, first_line
from ..files.locations import is_hub_id, named_autoencoder
from ..files.weight_files import stated_config, transformer_files
from .adapter_folder import (
    FACTS_FILE,
    FULL_FILE,
    LORA_FILE,
    LORA_PREFIX,
    AdapterError,
    base_location,
    is_of_pictures,
    read_facts,
)
from .published_files import find_autoencoder, hub_options, load_autoencoder

_LORA = "adapter"

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


def _video_autoencoder(
    location: str | Path, dtype: torch.dtype | None, options: Mapping[str, Any], changes: Mapping[str, Any] | None
) -> Any:
    place = find_autoencoder(location, hub_options(options))
    # A file may be of half precision, in which a base that is loaded in float32 is not meant to run.
    return load_autoencoder(place, dtype or torch.float32, changes, options.get("variant"))


@dataclass(frozen=True)
class AdaptedKind:
    """A kind of model that adapters are for.

    Args:
        transformer: class of the transformer.
        blocks: where its `num_layers` blocks are.
        ends: beginnings of the names of the parameters of embedder and head.
        retarget: gives a transformer new ends for so many channels that go in and come out, in its dtype.
        autoencoder: loads the new autoencoder, of a location, a dtype, the arguments of `from_pretrained`, and changes
            of its configuration.
    """

    transformer: Any
    blocks: str
    ends: tuple[str, ...]
    retarget: Callable[[Any, int, int], Any]
    autoencoder: Callable[[str | Path, torch.dtype | None, Mapping[str, Any], Mapping[str, Any] | None], Any]


WAN = AdaptedKind(WanTransformer3DModel, "blocks", ("patch_embedding.", "proj_out."), retarget, _video_autoencoder)


def load_adapter(transformer: Any, folder: Path, kind: AdaptedKind = WAN) -> Any:
    """Load an adapter into a transformer that `kind.retarget` has prepared; its LoRA stays apart.

    Raises:
        AdapterError: it belongs to a model of another shape, lacks a part of embedder, head or LoRA, or is damaged.
    """
    from safetensors.torch import load_file

    facts = read_facts(folder)
    own = dict(transformer.named_parameters())
    _names(folder / FULL_FILE)
    full = load_file(folder / FULL_FILE)
    missing = sorted(name for name in own if name.startswith(kind.ends) and name not in full)
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
        _load_lora(transformer, folder / LORA_FILE)
    return transformer


def _load_lora(transformer: Any, file: Path) -> None:
    """diffusers only warns of layers that a LoRA lacks, which then do nothing, and of those that it does not know."""
    from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
    from peft.utils import get_peft_model_state_dict

    names = _names(file)
    if not any(name.startswith(f"{LORA_PREFIX}.") for name in names):
        raise AdapterError(f"{file} holds no LoRA of a {LORA_PREFIX}: write or download the adapter again.")
    stored = {name.removeprefix(f"{LORA_PREFIX}.") for name in names}
    try:
        transformer.load_lora_adapter(file.parent, weight_name=file.name, prefix=LORA_PREFIX, adapter_name=_LORA)
    except (ValueError, RuntimeError, KeyError) as error:  # no layer of such a name, other ranks, no LoRA at all
        raise AdapterError(f"{file} cannot be put on the transformer: {first_line(error)}") from error
    put = set(get_peft_model_state_dict(transformer, adapter_name=_LORA))
    config = transformer.peft_config[_LORA]
    bare = {
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and check_target_module_exists(config, name)
    }
    bare -= {name for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}
    for problem, found in (
        ("lacks", bare | (put - stored)),
        ("has layers that the transformer does not:", stored - put),
    ):
        if found:
            raise AdapterError(
                f"{file} {problem} {few_of(sorted(found))}: it was not written as a whole, or is of another model; "
                "write or download the adapter again."
            )


def _names(file: Path) -> set[str]:
    """Of the tensors in a file.

    Raises:
        AdapterError: it is not there, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return set(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{file} cannot be read ({first_line(error)}): write or download the adapter again."
        ) from error


def adapted_transformer(
    folder: Path, base: str, dtype: torch.dtype | None = None, kind: AdaptedKind = WAN, **hub: Any
) -> Any:
    """The transformer of a base with the adapter in a folder, its LoRA merged.

    Args:
        folder: with the adapter.
        base: folder or hub id of the pipeline that it is for.
        dtype: of the weights.
        kind: of the model.
        hub: how to reach the hub, as arguments of `from_pretrained`.

    Raises:
        AdapterError: it does not fit the base, or is damaged; where the base is a folder, said before it is loaded.
        OSError: the base is not there.
    """
    facts = _checked_facts(folder)
    config = facts["transformer"]
    known = Path(base).is_dir() and _check_base(folder, facts, base, base)
    transformer = kind.transformer.from_pretrained(base, subfolder="transformer", dtype=dtype, **hub)
    layers = len(getattr(transformer, kind.blocks))
    if layers != config["num_layers"]:
        raise AdapterError(
            f"{folder} belongs to a model of {config['num_layers']} layers, and {base} has {layers}: give the model it "
            f"was made from, {facts['base']}, with base=."
        )
    if not Path(base).is_dir():
        known = "base_hash" in facts and _check_base(folder, facts, base, _downloaded(base, hub))
    shape = ("patch_size", "in_channels", "out_channels")
    if not known and all(_plain(transformer.config[key]) == _plain(config.get(key)) for key in shape):
        raise AdapterError(
            f"{base} has been moved to the autoencoder of {folder} already: give the model that it was made from, "
            f"{facts['base']}, with base=."
        )
    kind.retarget(transformer, config["in_channels"], config["out_channels"])
    load_adapter(transformer, folder, kind)
    if facts["lora"]:
        transformer.fuse_lora()
        transformer.unload_lora()
    return transformer.eval()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _checked_facts(folder: Path) -> dict[str, Any]:
    """`read_facts`, and that the files are there and whole.

    Raises:
        AdapterError: they are not.
    """
    facts = read_facts(folder)
    config = facts["transformer"]
    needed = ("num_layers", "in_channels", "out_channels")
    missing = [key for key in needed if not isinstance(config, dict) or not isinstance(config.get(key), int)]
    if missing:
        raise AdapterError(
            f"{folder / FACTS_FILE} does not say the {missing[0]} of the transformer as a whole number: write or "
            "download the adapter again."
        )
    for name in (FULL_FILE, *((LORA_FILE,) if facts["lora"] else ())):
        _names(folder / name)
    return facts


def _check_base(folder: Path, facts: Mapping[str, Any], base: str, files: str) -> bool:
    """Whether a base is known to be the one that an adapter was trained on; AdapterError where it is another.

    Old adapters do not say which it is; nor can it be told of a base with weights of a variant alone.

    Args:
        base: as it was named.
        files: folder of the pipeline, of which there is the transformer.
    """
    wanted = facts.get("base_hash")
    if wanted is None or stated_config(files) is None:  # no transformer: what loads it says so
        return False
    if variant_in(Path(files) / "transformer") is not None:
        return False
    if transformer_files(files) != wanted:
        raise AdapterError(
            f"{folder} was trained on {facts['base']}, and the transformer of {base} has other weights: give the model "
            "that it was trained on with base=."
        )
    return True


def _downloaded(repository: str, hub: Mapping[str, Any]) -> str:
    """The folder of a pipeline of the hub whose transformer was loaded."""
    import huggingface_hub

    options = {name: value for name, value in hub.items() if name in ("cache_dir", "revision", "token")}
    return huggingface_hub.snapshot_download(
        repository, allow_patterns=["transformer/*"], local_files_only=True, **options
    )


def own_base(folder: Path, stated: str, given: str | Path | None = None) -> str:
    """Folder or hub id of the base that an adapter was made for, or of another one that is given.

    Raises:
        AdapterError: there is none; the hub would be asked for it, and its answer names neither.
    """
    location = base_location(str(stated if given is None else given))
    if Path(location).is_dir() or is_hub_id(location):
        return location
    if given is not None:
        raise AdapterError(f"base is {location}, which is no folder here and no hub id of the form owner/name.")
    raise AdapterError(
        f"{folder} was made for the base in {stated}, which is not there: give its folder with base=, or put it back."
    )


def own_autoencoder(folder: Path, stated: str) -> str:
    """Folder or hub id of the autoencoder that an adapter was made for."""
    own = folder / "vae"
    found = str(own) if own.is_dir() else named_autoencoder(folder, stated)
    if found is None:
        raise AdapterError(
            f"{folder} was made for the autoencoder in {stated}, which is not there: give its folder with autoencoder=."
        )
    return found


def _check_class(pipeline_class: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """AdapterError where a class of videos is asked for an adapter for pictures, or for the other kind of videos."""
    if is_of_pictures(config):
        raise AdapterError(f"{folder} is an adapter for text to image: load it with DCGenPipeline.")
    given, made = config.get("in_channels"), config.get("out_channels")
    image = pipeline_class._sees_image
    if isinstance(made, int) and given == (made if image else 2 * made + 4):
        kinds = ("text", "DCVideoGenPipeline") if image else ("image", "DCVideoGenImageToVideoPipeline")
        raise AdapterError(f"{folder} is an adapter for {kinds[0]} to video: load it with {kinds[1]}.")


def _check_channels(folder: Path, made: int, vae: Any) -> None:
    """AdapterError where an autoencoder has other latents than the transformer makes, before the base is read."""
    channels = None if vae is None else vae.config.get("latent_channels")
    if channels is not None and channels != made:
        raise AdapterError(
            f"{folder} was made for an autoencoder of {made} latent channels, and this one has {channels}: "
            "give the one that it was made for, or leave autoencoder= and vae= out."
        )


def load_adapted(
    pipeline_class: Any,
    folder: Path,
    base: str | Path | None = None,
    autoencoder: str | Path | None = None,
    autoencoder_config: Mapping[str, Any] | None = None,
    kind: AdaptedKind = WAN,
    **options: Any,
) -> Any:
    """A pipeline from adapter-only weights and the base model they belong to, the LoRA merged.

    Args:
        pipeline_class: `DCVideoGenPipeline` or `DCVideoGenImageToVideoPipeline`, or one of another `kind`.
        folder: with the adapter.
        base, autoencoder: instead of those that the adapter names.
        autoencoder_config: see `published_files.load_autoencoder`.
        kind: of the model.
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
    if kind is WAN:
        _check_class(pipeline_class, folder, facts["transformer"])
    location = own_base(folder, facts["base"], base)
    dtype = options.get("dtype", options.get("torch_dtype"))
    of = (lambda name: dtype.get(name, dtype.get("default"))) if isinstance(dtype, dict) else (lambda name: dtype)
    if "vae" in options:
        vae = options.pop("vae")
    else:
        place = autoencoder or own_autoencoder(folder, facts["autoencoder"])
        vae = kind.autoencoder(place, of("vae"), options, autoencoder_config)
    _check_channels(folder, _checked_facts(folder)["transformer"]["out_channels"], vae)
    hub = hub_options(options, "revision", "variant", "use_safetensors")
    transformer = adapted_transformer(folder, location, of("transformer"), kind, **hub)
    if base is None:  # else it does not follow from the folder what the weights are
        transformer.register_to_config(_name_or_path=str(folder))
    # Through diffusers' own class, because the base is one of its pipelines.
    stock = next(c for c in pipeline_class.__mro__ if c.__module__.startswith("diffusers."))
    parts = stock.from_pretrained(location, transformer=None, vae=None, **options).components
    pipe = pipeline_class(**{**parts, "transformer": transformer, "vae": vae})
    return pipe if device_map is None else pipe.to(device_map)
