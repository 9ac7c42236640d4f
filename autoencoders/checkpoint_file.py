"""Files of published checkpoints, and folders of an `AutoencoderDCV`: parameters by name, as they lie there."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from .file_modes import as_new_files

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
"""How the names of checkpoint files end."""
_AVERAGES, _WEIGHTS = "ema_model_state_dict", "model_state_dict"
_CONFIG = "autoencoder_config"
UNTOLD = ("chunk_size", "scaling_factor", "pad_frames", "tail")
"""Fields of the configuration that do not follow from weights. Files that are written here say them."""
_FOLDER_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_FOLDER_FILE = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)")

_REFUSED = re.compile(r"GLOBAL (\S+)")
"""What torch says of a name in a file that is not among those of weights."""


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be; the message says which key and shape, and what to do."""


def strip_prefix(state: Mapping[str, Value]) -> dict[str, Value]:
    """Names without the "model." or "module." that all of them begin with."""
    state = dict(state)
    # One may stand before the other, in either order.
    for prefix in ("model.", "module.", "model."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def read_published(path: str | Path) -> dict[str, torch.Tensor]:
    """Parameters in a published file, mapped into memory where its format allows: `.pt` or `.safetensors`.

    A `.pt` holds `{"ema_model_state_dict": {tag: parameters}}` or `{"model_state_dict": parameters}`; it is loaded with
    `weights_only`, so nothing in it is run.

    Raises:
        CheckpointError: a file that is missing, truncated or of another kind.
    """
    return read_stated(path)[0]


def read_stated(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """`read_published`, and what the file says of `UNTOLD`: all of it if it was written here, else nothing.

    Raises:
        CheckpointError: as `read_published`; or what it says cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    check_suffix(path, "DC-AE-V")
    content = read_file(path)
    if path.suffix.lower() == ".safetensors":
        return strip_prefix(content), _stated(_metadata(path).get(_CONFIG), path)
    return strip_prefix(_parameters(content, path)), _stated(content.get(_CONFIG), path)


def check_suffix(path: Path, kind: str) -> None:
    """Raise CheckpointError for a file that is no checkpoint by its name; `kind` says of what one is wanted."""
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(
            f"{path} is no checkpoint by its name, which ends in {path.suffix or 'nothing'}: a {kind} file ends in "
            f"{', '.join(SUFFIXES)}."
        )


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _stated(config: str | None, path: Path) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        return {name: value for name, value in json.loads(config).items() if name in UNTOLD}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{_CONFIG} of {path} cannot be read as JSON: take it out of the file, or write that again."
        ) from error


def write_stated(state: Mapping[str, torch.Tensor], config: Mapping[str, Any], path: Path, suffix: str) -> None:
    """A published file of these parameters, which also says `UNTOLD` of their configuration.

    Args:
        suffix: ".safetensors", or another for a file of `torch.save`; the path may have one of its own.
    """
    from safetensors.torch import save_file

    stated = json.dumps({name: config[name] for name in UNTOLD if name in config})
    if suffix == ".safetensors":
        save_file(dict(state), path, {"format": "pt", _CONFIG: stated})
        as_new_files(path)
    else:
        torch.save({_WEIGHTS: dict(state), _CONFIG: stated}, path)


def read_file(path: Path) -> Any:
    """What a `.safetensors` or a file of `torch.save` holds, mapped into memory where its format allows.

    Raises:
        CheckpointError: a file that is damaged, or holds something other than weights.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with path.open("rb") as file:
            # Only the zip archives that torch.save writes since 1.6 can be mapped.
            mappable = file.read(4) == b"PK\x03\x04"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds {other_than_weights(error)}, or is damaged: take a file of weights alone, such as a "
            ".safetensors, or download it again."
        ) from error
    except Exception as error:  # each library has its own errors for a damaged file
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read, so it is damaged or cut short: download it again. "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error


def other_than_weights(error: pickle.UnpicklingError) -> str:
    """What a file of `torch.save` holds that is not read, after "holds".

    Not in torch's words, which say how to read it all the same, and run what is in it.
    """
    found = _REFUSED.search(str(error))
    return f"something other than weights{f' ({found[1]})' if found else ''}"


def _parameters(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Averaged weights if there are any, otherwise those of the model, otherwise what the file itself holds."""
    if not isinstance(content, dict):
        raise _no_parameters(path, f"a {type(content).__name__}")
    averages, weights = content.get(_AVERAGES), content.get(_WEIGHTS)
    if isinstance(averages, dict) and not _has_tensors(averages):
        by_tag = {tag: value for tag, value in averages.items() if isinstance(value, dict)}
        if len(by_tag) > 1:
            raise CheckpointError(f"{path} has several averages ({', '.join(map(str, by_tag))}): keep one of them.")
        averages = next(iter(by_tag.values()), {})
    if isinstance(averages, dict) and averages:
        return _only_tensors(averages, path, f"{_AVERAGES} of {path}")
    if isinstance(weights, dict) and weights:
        if _AVERAGES in content:
            logger.warning("%s has no averaged weights in %s: those of %s are taken.", path, _AVERAGES, _WEIGHTS)
        return _only_tensors(weights, path, f"{_WEIGHTS} of {path}")
    if _has_tensors(content):
        return _only_tensors(content, path, str(path))
    empty = not content or _AVERAGES in content or _WEIGHTS in content
    raise _no_parameters(path, "no parameters" if empty else f"the keys {', '.join(map(str, list(content)[:5]))}")


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in content.values())


def _no_parameters(path: Path, held: str) -> CheckpointError:
    return CheckpointError(f"{path} holds {held}, but a DC-AE-V checkpoint holds {_AVERAGES} or {_WEIGHTS}.")


def _only_tensors(state: dict[Any, Any], path: Path, where: str) -> dict[str, torch.Tensor]:
    if not _has_tensors(state):
        raise _no_parameters(path, f"no parameters under the keys {', '.join(map(str, list(state)[:5]))}")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{where} has the key {name}, which is a {type(value).__name__} and no parameter: take it out of the "
                "file."
            )
        if value.is_meta:
            raise CheckpointError(
                f"{where} has {name} {list(value.shape)} without its numbers: it was saved before it was loaded; write "
                "or download the file again."
            )
    return state


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters in the folder of a saved `AutoencoderDCV`, in the type and under the names that its files have.

    Raises:
        CheckpointError: no weights, files that are missing or damaged, or a parameter that two files have.
    """
    state: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks {file.name}, which its index names: download it again.")
        part = read_file(file)
        if not isinstance(part, dict):
            raise CheckpointError(f"{file} holds a {type(part).__name__}, not parameters by name.")
        twice = state.keys() & part.keys()
        if twice:
            raise CheckpointError(f"{file} has {min(twice)} once more: another file of {folder} has it too.")
        state |= _only_tensors(part, file, str(file))
    return state


def variant_in(folder: Path, wanted: str | None = None) -> str | None:
    """Which variant of the weights in the folder of a model to load with `from_pretrained`: the wanted one if it is
    there, else the usual weights, and where there are none, the only variant."""
    found = {match[1] for file in folder.glob("*") if (match := _FOLDER_FILE.fullmatch(file.name))}
    if wanted in found:
        return wanted
    return next(iter(found)) if len(found) == 1 else None


def _weight_files(folder: Path) -> Iterator[Path]:
    variant = variant_in(folder)
    infix = "" if variant is None else f".{variant}"
    for usual in _FOLDER_FILES:
        stem, _, kind = usual.partition(".")
        name, index = f"{stem}{infix}.{kind}", folder / f"{usual}.index{infix}.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{index} cannot be read as an index of weights: {error!r}") from error
            yield from (folder / name for name in names)
            return
        if (folder / name).is_file():
            yield folder / name
            return
    raise CheckpointError(f"{folder} has no weights: neither {' nor '.join(_FOLDER_FILES)}.")


__all__ = [
    "SUFFIXES",
    "UNTOLD",
    "CheckpointError",
    "check_suffix",
    "other_than_weights",
    "read_file",
    "read_folder",
    "read_published",
    "read_stated",
    "strip_prefix",
    "variant_in",
    "write_stated",
]
