"""Where the parts of a DC-VideoGen model come from: folders and files here, and repositories of the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...autoencoders import AutoencoderDCV
from ...autoencoders.checkpoint_file import variant_in
from ...autoencoders.convert import load_published
from ..errors import first_line
from ..files.locations import is_hub_id

AUTOENCODER_FILES = ("dc-ae-v-*.pt", "dc-ae-v-*.safetensors", "*.pt")
"""How files of a DC-AE-V are named, the usual names first."""
_AUTOENCODER_FOLDER = ("config.json", "diffusion_pytorch_model*")
_HUB_OPTIONS = ("cache_dir", "token", "local_files_only")


class LayoutError(ValueError):
    """A folder that is no DC-VideoGen model; the message says what is missing and how to give it."""


def hub_options(options: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Of the arguments of `from_pretrained`, those that say how to reach the hub, and `more`.

    `revision` is not among them: it belongs to the one repository that was asked for.
    """
    return {name: options[name] for name in (*_HUB_OPTIONS, *more) if options.get(name) is not None}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        LayoutError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise LayoutError(f"{path} holds a {type(content).__name__}, but it must be a JSON object.")
    return content


def download(what: str, repository: str, patterns: list[str], options: Mapping[str, Any]) -> Path:
    """The folder with files of a repository of the hub.

    Args:
        what: the argument that named it, for messages.
        patterns: of the names of the files.
        options: see `hub_options`.

    Raises:
        LayoutError: it is not there, or cannot be reached.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hub.snapshot_download(repository, allow_patterns=patterns, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise LayoutError(f"{what}: {repository} cannot be had from the hub ({first_line(error)}).") from error


def base_folder(base: str | Path, components: list[str], options: Mapping[str, Any]) -> Path:
    """The folder of a Wan pipeline, of which these components are downloaded where it is on the hub."""
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    return download("base", str(base), [f"{name}/*" for name in components], options)


def own_autoencoder(folder: Path) -> Path | None:
    """The autoencoder in a folder: that of an `AutoencoderDCV` itself, or a published file; None without one.

    Raises:
        LayoutError: there are several.
    """
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("_class_name") == AutoencoderDCV.__name__:
        return folder
    for pattern in AUTOENCODER_FILES:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise LayoutError(f"{folder} has several autoencoders ({names}): choose one with autoencoder=.")
        if found:
            return found[0]
    return None


def find_autoencoder(given: str | Path, options: Mapping[str, Any]) -> Path:
    """File, or folder of an `AutoencoderDCV`, that `autoencoder=` means.

    Args:
        given: one of these, a folder that holds the file, or a hub id.
        options: see `hub_options`.

    Raises:
        LayoutError: there is none, or several.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if is_hub_id(str(given)):
        path = download("autoencoder", str(given), [*AUTOENCODER_FILES, *_AUTOENCODER_FOLDER], options)
    found = own_autoencoder(path) if path.is_dir() else None
    if found is None:
        raise LayoutError(
            f"autoencoder: {path} is neither a DC-AE-V file, nor the folder of an AutoencoderDCV, nor a folder with "
            f"such a file ({', '.join(AUTOENCODER_FILES)}), nor a hub id."
        )
    return found


def load_autoencoder(
    place: Path,
    dtype: torch.dtype | None = None,
    changes: Mapping[str, Any] | None = None,
    variant: str | None = None,
) -> AutoencoderDCV:
    """The autoencoder in a file or folder of `find_autoencoder`.

    Args:
        dtype: of its weights; as they are stored in a file, and float32 from a folder, when None.
        changes: fields of the configuration that the weights in a file do not tell.
        variant: of the weights in a folder, where it has that; see `variant_in`.

    Raises:
        LayoutError: changes to a folder, which has its own.
        CheckpointError: see `load_published`.
    """
    if place.is_file():
        return load_published(place, dtype, **(changes or {}))
    refuse_changes(place, changes)
    return AutoencoderDCV.from_pretrained(place, dtype=dtype, variant=variant_in(place, variant))


def refuse_changes(folder: Path, changes: Mapping[str, Any] | None) -> None:
    """LayoutError where a configuration is given for an autoencoder that has its own."""
    if changes:
        raise LayoutError(
            f"autoencoder_config ({', '.join(changes)}) is for a DC-AE-V file, and {folder} has its own config.json: "
            "leave it out."
        )
