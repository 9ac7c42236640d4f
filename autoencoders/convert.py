"""Published DC-AE-V checkpoints to `AutoencoderDCV` and back."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from .autoencoder_dc_v import AutoencoderDCV
from .checkpoint_file import (
    SUFFIXES,
    UNTOLD,
    CheckpointError,
    read_folder,
    read_published,
    read_stated,
    strip_prefix,
    variant_in,
    write_stated,
)
from .dtypes import resolve_dtype
from .presets import PRESETS

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

_PARTS = {
    "encoder.project_in.conv.conv": "encoder.conv_in",
    "encoder.project_out.conv": "encoder.conv_out",
    "decoder.project_in.conv": "decoder.conv_in",
    "decoder.project_out.op_list.0": "decoder.norm_out",
    "decoder.project_out.op_list.2.conv.conv": "decoder.conv_out",
}
_LAYERS = {"conv1.conv": "conv1", "conv2.conv": "conv2", "conv2.norm": "norm"}
_STAGE = re.compile(r"(encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.main\.(.+)\.(weight|bias)")


PUBLISHED_CHUNK = 40
"""Pixel frames of a chunk of every published variant."""
# Of what weights do not tell, what differs between published variants.
_UNSAID = ("chunk_size", "scaling_factor")


def published_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Names in a published checkpoint -> names in `AutoencoderDCV` of this configuration, for every parameter."""
    layers = list(config["layers_per_block"])[1:]
    names: dict[str, str] = {}
    for theirs, ours in _PARTS.items():
        names |= {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    last = len(layers)
    for stage, count in enumerate(layers, start=1):
        step = stage < last
        sides = {
            "encoder": (f"encoder.down_blocks.{stage - 1}", 0, count, "downsampler"),
            "decoder": (f"decoder.up_blocks.{last - stage}", int(step), 0, "upsampler"),
        }
        for side, (block, first, place, sampler) in sides.items():
            blocks = f"{side}.stages.{stage}.op_list"
            for layer in range(count):
                theirs, ours = f"{blocks}.{first + layer}.main", f"{block}.resnets.{layer}"
                for kinds, (old, new) in zip(
                    (("weight", "bias"), ("weight",), ("weight", "bias")), _LAYERS.items(), strict=True
                ):
                    names |= {f"{theirs}.{old}.{kind}": f"{ours}.{new}.{kind}" for kind in kinds}
            if step:
                theirs, ours = f"{blocks}.{place}.main.conv.conv", f"{block}.{sampler}.conv"
                names |= {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    return names


def infer_config(shapes: Mapping[str, Iterable[int]]) -> dict[str, Any]:
    """Channels and layers of a published checkpoint, from the shapes of its parameters.

    Chunk length and scaling factor cannot be read from weights: they are those of the published variant with these
    widths and channels, else the defaults of `AutoencoderDCV`.

    Raises:
        CheckpointError: a key is missing that tells a width.
    """
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    layers: dict[int, int] = {}
    widths: dict[int, int] = {}
    count = 0
    for name, shape in shapes.items():
        match = _STAGE.fullmatch(name)
        if match and match[1] == "encoder":
            stage = int(match[2])
            layers.setdefault(stage, 0)
            if match[4] == "conv1.conv" and match[5] == "weight":
                layers[stage] += 1
            if match[4].endswith("conv") and match[5] == "weight":
                widths[stage] = _convolution(name, tuple(shape))[1]
            # Behind a step in size there is one more stage. Without blocks it has no keys of its own.
            count = max(count, stage + (match[4] == "conv.conv"))
    ends = ("encoder.project_in.conv.conv.weight", "encoder.project_out.conv.weight")
    for name in ends:
        if name not in shapes:
            raise CheckpointError(
                f"The checkpoint has no {name} (a convolution [out, in, 3, 3, 3]), so it is no published DC-AE-V. Its "
                f"keys begin with {', '.join(list(shapes)[:3])}."
            )
    first, last = (_convolution(name, tuple(shapes[name])) for name in ends)
    # The output convolution tells the width of a last stage without blocks.
    widths.setdefault(count, last[1])
    missing = [stage for stage in range(1, count + 1) if stage not in widths]
    if missing or not count:
        raise CheckpointError(f"The checkpoint has no parameters of encoder.stages.{(missing or [1])[0]}.")
    config: dict[str, Any] = {
        "in_channels": first[1],
        "latent_channels": last[0],
        # The outermost width is nowhere in the weights, since no block has it.
        "block_out_channels": (widths[1], *(widths[stage] for stage in range(1, count + 1))),
        "layers_per_block": (0, *(layers.get(stage, 0) for stage in range(1, count + 1))),
    }
    return {**config, **_published_variant(config)}


def _convolution(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 5:
        raise CheckpointError(
            f"{name} is {list(shape)} in the checkpoint, but in a DC-AE-V it is a convolution [out, in, 3, 3, 3]."
        )
    return shape


def _published_variant(config: Mapping[str, Any]) -> dict[str, Any]:
    """The preset with these widths, layers and channels; empty where none has them."""
    for variant in PRESETS.values():
        same = all(tuple(variant[key])[1:] == config[key][1:] for key in ("block_out_channels", "layers_per_block"))
        if same and variant["latent_channels"] == config["latent_channels"]:
            return {**variant, "chunk_size": PUBLISHED_CHUNK}
    return {}


def check_shapes(shapes: Mapping[str, Iterable[int]], config: Mapping[str, Any], source: str = "checkpoint") -> None:
    """Compare the shapes of a published checkpoint with what a configuration needs, without allocating anything.

    Raises:
        CheckpointError: keys that are missing or unknown, or a shape that differs; names the first of each.
    """
    own = _own_shapes(config)
    wanted = {theirs: own[ours] for theirs, ours in published_names(config).items()}
    _compare(shapes, wanted, config, source)


def _own_shapes(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of the parameters of an `AutoencoderDCV`, without allocating anything."""
    with torch.device("meta"):
        # The `config` of a model also has what follows from its arguments.
        arguments = inspect.signature(AutoencoderDCV.__init__).parameters
        model = AutoencoderDCV(**{key: value for key, value in config.items() if key in arguments})
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def _compare(
    shapes: Mapping[str, Iterable[int]], wanted: Mapping[str, list[int]], config: Mapping[str, Any], source: str
) -> None:
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in shapes]
    unknown = [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in wanted]
    wrong = [
        f"{name} is {list(shapes[name])}, not {shape}"
        for name, shape in wanted.items()
        if name in shapes and list(shapes[name]) != shape
    ]
    for problem, found in (("lacks", missing), ("has unknown keys:", unknown), ("has other shapes:", wrong)):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise CheckpointError(
                f"The {source} {problem} {found[0]}{more}. It does not belong to the variant with latent_channels "
                f"{config['latent_channels']} and block_out_channels {list(config['block_out_channels'])}."
            )


def convert_state_dict(
    published: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Parameters of a published checkpoint under the names of `AutoencoderDCV`, of any width.

    Strict: each key is used once and none is missing.

    Args:
        published: parameters by published name, with or without the prefix "model.".
        config: of the model they are for; what they themselves say when None.

    Raises:
        CheckpointError: see `check_shapes`.
    """
    published = strip_prefix(published)
    shapes = {name: value.shape for name, value in published.items()}
    config = infer_config(shapes) if config is None else config
    check_shapes(shapes, config)
    return {ours: published[theirs] for theirs, ours in published_names(config).items()}


def to_published(state: Mapping[str, Value], config: Mapping[str, Any]) -> dict[str, Value]:
    """The inverse of `convert_state_dict`: parameters of `AutoencoderDCV` under their published names.

    Raises:
        CheckpointError: a parameter is missing or unknown.
    """
    names = published_names(config)
    missing, unknown = set(names.values()) - set(state), set(state) - set(names.values())
    if missing or unknown:
        raise CheckpointError(f"Not the parameters of this configuration: {sorted(missing | unknown)[0]}.")
    return {theirs: state[ours] for theirs, ours in names.items()}


def _warn_of_guesses(config: Mapping[str, Any], path: str | Path) -> None:
    """Say what a variant that is not published is taken to be; with the wrong values its videos are wrong."""
    arguments = inspect.signature(AutoencoderDCV.__init__).parameters
    guesses = [f"{name} is taken to be {arguments[name].default}" for name in _UNSAID if name not in config]
    if guesses:
        logger.warning(
            "%s is none of the published variants, and its weights do not tell everything: %s. If it was trained with "
            "others, its videos are wrong without them.",
            path,
            " and ".join(guesses),
        )


def load_published(path: str | Path, dtype: torch.dtype | str | None = None, **changes: Any) -> AutoencoderDCV:
    """An `AutoencoderDCV` with the weights of a published file.

    Args:
        path: `.pt` or `.safetensors`.
        dtype: of the weights, maybe by name, such as "bfloat16"; as in the file when None.
        changes: fields of the configuration that weights do not tell, such as `chunk_size`, instead of what the file
            says of them (see `write_published_file`) and of those of the published variants.

    Raises:
        CheckpointError: see `read_published` and `check_shapes`. Shapes are checked before weights are read.
        ValueError: a dtype whose name is unknown.
    """
    dtype = resolve_dtype(dtype)
    unknown = changes.keys() - inspect.signature(AutoencoderDCV.__init__).parameters.keys()
    if unknown:
        raise CheckpointError(
            f"The configuration of an AutoencoderDCV has no {min(unknown)}; what weights do not tell "
            f"is {', '.join(UNTOLD)}."
        )
    published, stated = read_stated(path)
    shapes = {name: value.shape for name, value in published.items()}
    config = {**infer_config(shapes), **stated, **changes}
    check_shapes(shapes, config, str(path))
    _warn_of_guesses(config, path)
    state = convert_state_dict(published, config)
    with torch.device("meta"):
        model = AutoencoderDCV(**config)
    model.load_state_dict({k: v if dtype is None else v.to(dtype) for k, v in state.items()}, strict=True, assign=True)
    return model.eval()


def load_folder(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Parameters and configuration in the folder of a saved `AutoencoderDCV`, compared with one another.

    Strict, unlike `from_pretrained`: each parameter is there once, in its shape, and no other. Types stay as they are.

    Raises:
        CheckpointError: no such folder, or one whose files are damaged or do not belong together.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        why = "it is a file" if folder.is_file() else "it has no config.json"
        raise CheckpointError(f"{folder} is no folder of an AutoencoderDCV: {why}.")
    try:
        config = dict(AutoencoderDCV.load_config(folder))
        if config.get("_class_name") != AutoencoderDCV.__name__:
            raise ValueError(f"config.json is of the class {config.get('_class_name')}")
        wanted = _own_shapes(config)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as an AutoencoderDCV: {error}") from error
    state = read_folder(folder)
    _compare({name: value.shape for name, value in state.items()}, wanted, config, str(folder))
    return state, config


def write_published_file(folder: str | Path, target: Path) -> None:
    """Write the folder of an `AutoencoderDCV` as one published file, whole or not at all.

    The file also says what its weights do not tell (`UNTOLD`), beside them, where published code does not look.

    Args:
        folder: see `load_folder`, also for errors.
        target: ends in `.pt` or `.safetensors`; its folder is made where there is none.
    """
    state, config = load_folder(folder)
    state = {name: value.contiguous() for name, value in to_published(state, config).items()}
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_stated(state, config, draft, target.suffix)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


__all__ = [
    "SUFFIXES",
    "CheckpointError",
    "check_shapes",
    "convert_state_dict",
    "infer_config",
    "load_folder",
    "load_published",
    "published_names",
    "read_published",
    "strip_prefix",
    "to_published",
    "variant_in",
    "write_published_file",
]
