"""Model folders: reading a config, one model or a part of one, and writing a pipeline whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...autoencoders.checkpoint_file import variant_in
from ...autoencoders.file_modes import as_new_files
from ...pipelines.files.json_files import write_json
from ...pipelines.files.locations import is_hub_id
from ...pipelines.files.plain_content import object_in
from ...pipelines.files.run_folder import NoAdapter, autoencoder_path, model_path
from ...pipelines.files.weight_files import transformer_files, transformer_tensors
from ...pipelines.quiet_logs import only_logs
from ..checkpoints.written import replaced
from ..config import ConfigError

__all__ = [
    "forget_paths",
    "load_autoencoder",
    "load_part",
    "located",
    "read_config",
    "to_cpu",
    "transformer_files",
    "write_model",
    "write_pipeline",
]


def located(location: str, setting: str, *built_in: str, part: str = "") -> str:
    """Where a model is: a folder or hub id as it is, of the folder of a run the model that it made, and the folder of a
    built-in one.

    Args:
        location: as the user wrote it.
        setting: that names it, for the message.
        built_in: names of the built-in pipelines that have such a model.
        part: of such a pipeline, an autoencoder; "" for a whole one.

    Raises:
        ConfigError: none of them; or a run that makes no model, or has none yet.
    """
    from ... import demo

    if location in built_in:
        return str(demo.path(location) / part)
    if Path(location).is_dir():
        try:
            return str(autoencoder_path(location) if part else model_path(location))
        except NoAdapter as error:
            raise ConfigError(f"{setting}: {error}") from error
    if is_hub_id(location):
        return location
    if Path(location).is_file() and part == "vae":
        raise ConfigError(
            f"{setting}: {location} is a file, and training takes the folder of an autoencoder: make one of a "
            f"published file with `vidaccel convert {location} FOLDER`, and give that."
        )
    named = " or ".join(f'"{name}"' for name in built_in)
    raise ConfigError(
        f"{setting}: {location} is no folder here, no hub id of the form owner/name, and not the built-in {named}: "
        "correct the path, or make the model first."
    )


def read_config(cls: Any, location: str, subfolder: str | None = None) -> dict:
    """The config of a model of diffusers.

    Raises:
        ConfigError: there is none that can be read.
    """
    try:
        return dict(cls.load_config(location, subfolder=subfolder))
    except (OSError, ValueError) as error:
        where = f"{location}/{subfolder}" if subfolder else location
        raise ConfigError(
            f"model: {where} has no readable config.json of a {cls.__name__}: {error}"
            f"{'' if subfolder else _way(cls, location)}"
        ) from error


def _way(cls: Any, location: str) -> str:
    """Behind a message, how a published autoencoder becomes one that diffusers loads."""
    if cls.__name__ != "AutoencoderDCV":
        return ""
    return f" If it is a published one, make a folder of it with `vidaccel convert {location} FOLDER`, and give that."


def load_autoencoder(cls: Any, location: str, setting: str, **options: Any) -> Any:
    """An autoencoder of diffusers.

    Args:
        cls: its class.
        location: folder or hub id.
        setting: that names it, for the message.
        options: of `from_pretrained`.

    Raises:
        ConfigError: it cannot be loaded.
    """
    folder = Path(location) / (options.get("subfolder") or "")
    try:
        return cls.from_pretrained(location, variant=variant_in(folder), **options)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights of other shapes than the config says
        way = "" if (Path(location) / "config.json").is_file() or options.get("subfolder") else _way(cls, location)
        raise ConfigError(
            f"{setting}: {location} is no autoencoder that {cls.__name__} can load: {error}{way}"
        ) from error


def load_part(cls: Any, base: str, name: str, dtype: torch.dtype) -> Any:
    """One module of the transformer of a pipeline, on the CPU, without reading the rest, which may be 28 GB.

    Args:
        cls: of the transformer.
        base: folder or hub id of the pipeline.
        name: of the module in the transformer.
        dtype: of its weights.
    """
    tensors = transformer_tensors(base, lambda key: key.startswith(f"{name}."))
    if not tensors:  # not in safetensors
        return cls.from_pretrained(base, subfolder="transformer", dtype=dtype).get_submodule(name)
    from accelerate import init_empty_weights

    with init_empty_weights():
        part = cls.from_config(cls.load_config(base, subfolder="transformer")).get_submodule(name)
    own = {key.removeprefix(f"{name}."): value.to(dtype) for key, value in tensors.items()}
    part.load_state_dict(own, assign=True)
    return part


def to_cpu(pipe: Any) -> None:
    """Move the models of a pipeline to the CPU, where it could not run in half precision, but keeps."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to("cpu")


def write_model(model: Any, folder: Path) -> None:
    """Write a model or a pipeline; what was in the folder is replaced once all is written.

    Raises:
        OSError: it cannot be written.
    """
    with replaced(folder) as draft:
        model.save_pretrained(draft, safe_serialization=True)
        as_new_files(draft)
        forget_paths(draft)


def write_pipeline(
    pipe: Any, folder: Path, base: str, untouched: Sequence[str], autoencoder: str | None = None
) -> None:
    """Write a pipeline whose other components are those of a base, file by file: loaded and written again, they would
    be rounded to the precision that the training has its frozen weights in.

    Args:
        pipe: with what was trained, and None for each untouched component.
        folder: as that of `write_model`.
        base: folder or hub id of the pipeline that has them.
        untouched: their names; those that the base does not have are left out.
        autoencoder: folder or hub id of the one that the pipeline has; its files are copied, too. None where it is
            among the untouched.

    Raises:
        OSError: it cannot be written, or the base cannot be read any more.
    """
    from diffusers import DiffusionPipeline

    index = DiffusionPipeline.load_config(base)
    there = [name for name in untouched if (index.get(name) or [None])[0] is not None]
    source = Path(base)
    if there and not source.is_dir():
        others = {name: None for name, entry in index.items() if isinstance(entry, list | tuple) and name not in there}
        source = Path(DiffusionPipeline.download(base, **others))
    if gone := [name for name in there if not (source / name).is_dir()]:
        raise OSError(f"the base {base} has no {', '.join(gone)} any more, which the pipeline would have from it.")
    with replaced(folder) as draft:
        with _untold_of_none():
            pipe.save_pretrained(draft, safe_serialization=True)
        as_new_files(draft)
        for name in there:
            shutil.copytree(source / name, draft / name, dirs_exist_ok=True)
            _without_variant(draft / name)
        if autoencoder is not None:
            _copy_model(autoencoder, draft / "vae")
        file = draft / "model_index.json"
        content = object_in(file) | {name: index[name] for name in there}
        write_json(file, content)
        forget_paths(draft)


def _untold_of_none() -> contextlib.AbstractContextManager[None]:
    """Without what diffusers says of each component that is None, as if a pipeline lacked it."""
    return only_logs("diffusers.pipelines.pipeline_utils", lambda message: "=None of type" not in message)


def _copy_model(location: str, target: Path) -> None:
    """Put the files of a model of diffusers in place of those in a folder.

    Args:
        location: folder, or hub id of one that was loaded before.
    """
    names = ("config.json", "diffusion_pytorch_model*")
    source = Path(location)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(location, allow_patterns=list(names), local_files_only=True))
    shutil.rmtree(target)
    target.mkdir()
    for file in sorted(file for name in names for file in source.glob(name)):
        shutil.copy(file, target / file.name)
    _without_variant(target)


def _without_variant(folder: Path) -> None:
    """Give weights of which there is a variant alone their usual names: of a pipeline whose other parts have no such
    variant, diffusers would look for those."""
    variant = variant_in(folder)
    if variant is None:
        return
    for file in sorted(folder.glob("diffusion_pytorch_model*")):
        if file.suffix == ".json":
            try:
                content = object_in(file)
                places = {key: name.replace(f".{variant}", "", 1) for key, name in content["weight_map"].items()}
            except (ValueError, KeyError, AttributeError) as error:
                raise OSError(f"{folder.name}/{file.name} cannot be read as an index of weights: {error!r}") from error
            write_json(file, {**content, "weight_map": places})
        file.rename(folder / file.name.replace(f".{variant}", "", 1))


def forget_paths(folder: Path) -> None:
    """Remove where the parts were loaded from, which diffusers and transformers write into their configs."""
    for file in folder.rglob("*.json"):
        try:
            content = object_in(file)
        except ValueError:  # a copy of what else a base holds; nobody has written a place into it
            continue
        if content.pop("_name_or_path", None) is not None:
            write_json(file, content)
