"""Published DC-AE-V checkpoints to `AutoencoderDCV` and back."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from .autoencoder_dc_v import AutoencoderDCV
from .presets import PRESETS

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


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be; the message says which key and shape, and what to do."""


def published_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Names in a published checkpoint -> names in `AutoencoderDCV` of this configuration, for every parameter."""
    layers = list(config["layers_per_block"])[1:]
    names = {}
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
                widths[stage] = shape[1]
            # Behind a step in size there is one more stage. Without blocks it has no keys of its own.
            count = max(count, stage + (match[4] == "conv.conv"))
    try:
        first, last = shapes["encoder.project_in.conv.conv.weight"], shapes["encoder.project_out.conv.weight"]
    except KeyError as error:
        raise CheckpointError(
            f"The checkpoint has no {error.args[0]}, so it is no published DC-AE-V. Its keys begin with "
            f"{', '.join(list(shapes)[:3])}."
        ) from None
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
    for variant in PRESETS.values():
        same = all(tuple(variant[key])[1:] == config[key][1:] for key in ("block_out_channels", "layers_per_block"))
        if same and variant["latent_channels"] == config["latent_channels"]:
            return {**config, **variant}
    return config


def check_shapes(shapes: Mapping[str, Iterable[int]], config: Mapping[str, Any], source: str = "checkpoint") -> None:
    """Compare the shapes of a published checkpoint with what a configuration needs, without allocating anything.

    Raises:
        CheckpointError: keys that are missing or unknown, or a shape that differs; names the first of each.
    """
    names = published_names(config)
    with torch.device("meta"):
        # The `config` of a model also has what follows from its arguments.
        arguments = inspect.signature(AutoencoderDCV.__init__).parameters
        wanted = AutoencoderDCV(**{key: value for key, value in config.items() if key in arguments}).state_dict()
    missing = [name for name in names if name not in shapes]
    unknown = [name for name in shapes if name not in names]
    wrong = [
        f"{name} is {list(shapes[name])}, not {list(wanted[ours].shape)}"
        for name, ours in names.items()
        if name in shapes and tuple(shapes[name]) != tuple(wanted[ours].shape)
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


def strip_prefix(state: Mapping[str, Value]) -> dict[str, Value]:
    """Names without the "model." or "module." that all of them begin with."""
    state = dict(state)
    # One may stand before the other, in either order.
    for prefix in ("model.", "module.", "model."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def read_published(path: str | Path) -> dict[str, torch.Tensor]:
    """Parameters in a published file, mapped into memory, not read: `.pt` or `.safetensors`.

    A `.pt` holds `{"ema_model_state_dict": {tag: parameters}}` or `{"model_state_dict": parameters}`; it is loaded with
    `weights_only`, so nothing in it is run.

    Raises:
        CheckpointError: a file that is missing, truncated or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return strip_prefix(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds something other than weights, or is damaged: {error}".splitlines()[0]
        ) from error
    except Exception as error:  # each library has its own errors for a damaged file
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read, so it is damaged or cut short: download it again. "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    return strip_prefix(_parameters(content, path))


def _parameters(content: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(content, dict) and isinstance(content.get("ema_model_state_dict"), dict):
        averages = content["ema_model_state_dict"]
        if len(averages) > 1 and not _is_parameters(averages):
            raise CheckpointError(f"{path} has several averages ({', '.join(map(str, averages))}): keep one of them.")
        content = averages if _is_parameters(averages) else next(iter(averages.values()), {})
    elif isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        content = content["model_state_dict"]
    if not _is_parameters(content):
        kind = f"a {type(content).__name__}"
        if isinstance(content, dict):
            kind = f"the keys {', '.join(map(str, list(content)[:5]))}" if content else "no parameters"
        raise CheckpointError(
            f"{path} holds {kind}, but a DC-AE-V checkpoint holds ema_model_state_dict or model_state_dict."
        )
    return content


def _is_parameters(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(v, torch.Tensor) for v in content.values())


def load_published(path: str | Path, dtype: torch.dtype | None = None, **changes: Any) -> AutoencoderDCV:
    """An `AutoencoderDCV` with the weights of a published file.

    Args:
        path: `.pt` or `.safetensors`.
        dtype: of the weights; as in the file when None.
        changes: fields of the configuration that weights do not tell, such as `chunk_size`.

    Raises:
        CheckpointError: see `read_published` and `check_shapes`. Shapes are checked before weights are read.
    """
    published = read_published(path)
    shapes = {name: value.shape for name, value in published.items()}
    config = {**infer_config(shapes), **changes}
    check_shapes(shapes, config, str(path))
    state = convert_state_dict(published, config)
    with torch.device("meta"):
        model = AutoencoderDCV(**config)
    model.load_state_dict({k: v if dtype is None else v.to(dtype) for k, v in state.items()}, strict=True, assign=True)
    return model.eval()
