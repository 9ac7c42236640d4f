"""A transformer in a single file, as ComfyUI's users have it, with all else of a pipeline of diffusers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..deep_compression.published_files import LayoutError, download, read_json
from ..errors import first_line
from .conversions import conversion_place, discard, is_whole, stamps
from .drafts import beside, take

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_INDEX = "model_index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_SCALES = ("scaled_fp8", "scale_weight", "weight_scale", "comfy_quant")
"""What ComfyUI's files in 8 bits have beside their weights; ends of names."""


class SingleFileError(ValueError):
    """A file that cannot be the transformer of a pipeline; the message says why, and the fix."""


def pipeline_of(file: str | Path, components: str | Path, part: str = "transformer") -> Path:
    """The folder of a pipeline whose transformer is that of a single file, made once and kept in the cache.

    Its weights are as in the file, in diffusers' names and shapes; the other folders are links.

    Args:
        file: safetensors, in the names of the model's own code, as ComfyUI has them, or in diffusers'.
        components: folder or hub id of a pipeline of the same model, which has the config of the transformer, text
            encoder, autoencoder, scheduler and tokenizer. The weights of its own transformer are not downloaded.
        part: the transformer that it is, of a pipeline with two.

    Raises:
        SingleFileError: no such file, one in 8 bits or of another model, or components that have no such transformer.
        LayoutError: components that cannot be had.
    """
    file = Path(file).expanduser()
    check_file(file)
    folder, index = _components(str(components), part)
    others = [each for each in sorted(folder.iterdir()) if _is_taken(each, part)]
    used = [file, folder / part / "config.json", *others]  # not the transformer, of which more may be downloaded later
    target = conversion_place(file.stem, [part, *(stamp for each in used for stamp in stamps(each))])
    if is_whole(target):
        return target
    if target.exists():
        discard(target)  # what it links to is gone
    transformer = _read(file, folder, index, part)
    logger.warning("%s is written once in diffusers' layout, with all else of %s, into %s.", file, components, target)
    try:
        with beside(target) as draft:
            for each in others:
                take(each, draft / each.name, link=True)
            transformer.save_pretrained(draft / part)
    except OSError:
        if not is_whole(target):  # another process may have put it there first
            raise
    return target


def _is_taken(entry: Path, part: str) -> bool:
    """Whether what is in the folder of the components goes into that of the pipeline: parts, and settings."""
    if entry.name == part or entry.name.startswith("."):
        return False
    return entry.is_dir() or entry.suffix == ".json"


def check_file(file: Path) -> None:
    """Raise SingleFileError for what is no safetensors file of weights in floating point, by its header."""
    if not file.is_file():
        raise SingleFileError(f"there is no file {file}: correct the path.")
    if file.suffix != SUFFIX:
        raise SingleFileError(f"{file.name} ends in {file.suffix}: transformers are read from {SUFFIX} alone.")
    try:
        with safe_open(file, "pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise SingleFileError(f"{file} is damaged, or no safetensors file ({error}): download it again.") from error
    scaled = any(name.endswith(_SCALES) for name in kinds)
    if scaled or (other := sorted(set(kinds.values()) - set(_FLOATS))):
        how = "8 bits with scales of their own (fp8 scaled)" if scaled else f"{' and '.join(other)}"
        raise SingleFileError(
            f"the weights in {file.name} are in {how}: give the file in bf16 or fp16, of which these were made."
        )


def _components(components: str, part: str) -> tuple[Path, Mapping[str, Any]]:
    """The folder of a pipeline and its model_index.json; of the hub, with all but the weights of a transformer."""
    folder = Path(components).expanduser()
    if not folder.is_dir():
        index = read_json(download("components", components, [_INDEX], {}) / _INDEX)
        others = [f"{name}/*" for name, entry in index.items() if isinstance(entry, list) and entry[0] and name != part]
        folder = download("components", components, ["*.json", f"{part}/config.json", *others], {})
    if not (folder / _INDEX).is_file() or not (folder / part / "config.json").is_file():
        raise SingleFileError(
            f"components: {components} has no {_INDEX} and {part}/config.json: give the folder or hub id of a pipeline "
            "of diffusers, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    return folder, read_json(folder / _INDEX)


def _read(file: Path, folder: Path, index: Mapping[str, Any], part: str) -> Any:
    """The transformer, whose weights are mapped into memory."""
    import diffusers
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
    from safetensors.torch import load_file

    name = (index.get(part) or ["", ""])[1]
    known = SINGLE_FILE_LOADABLE_CLASSES.get(name)
    if known is None:
        raise SingleFileError(
            f"components: {folder} has a {name or 'transformer of no class'}, which diffusers does not read from "
            "single files: give a folder in its layout as the model."
        )
    cls: Any = getattr(diffusers, name)
    config = cls.load_config(str(folder), subfolder=part, local_files_only=True)
    with init_empty_weights():
        model = cls.from_config(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tensors = load_file(file)
    if not wanted.keys() <= tensors.keys():
        try:
            tensors = known["checkpoint_mapping_fn"](checkpoint=tensors, config=config)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            problem = f"{file.name} is no {name} that diffusers reads ({first_line(error)})"
            raise SingleFileError(f"{problem}: give the file of this model, or its components.") from error
    _check_fits(file.name, tensors, wanted, f"the {name} of {folder}")
    model.load_state_dict({key: value.contiguous() for key, value in tensors.items()}, assign=True)
    return model


def _check_fits(
    file: str, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raise SingleFileError unless a file has the weights of a transformer, all of them and no others."""
    missing, more = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    other = [name for name in wanted if name in tensors and tuple(tensors[name].shape) != wanted[name]]
    if not (missing or more or other):
        return
    if other:
        name = other[0]
        told = f"its {name} is {list(tensors[name].shape)}, and that of {what} {list(wanted[name])}"
    elif missing:
        told = f"it lacks {len(missing)} weights of {what}, such as {missing[0]}"
    else:
        told = f"it has {len(more)} weights that {what} has not, such as {more[0]}"
    raise SingleFileError(
        f"{file} is another model than the components: {told}. Give those of the same model and size."
    )


__all__ = ["LayoutError", "SingleFileError", "check_file", "pipeline_of"]
