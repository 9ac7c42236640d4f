"""The JSON files of a model, in a folder here or on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...pipelines.files.plain_content import object_in
from ..errors import BadInput

Reader = Callable[[str], "dict[str, Any] | None"]
"""Reads a JSON file of a model by its name: None when there is none, BadInput for one that cannot be read."""


def reader(location: str, what: str = "") -> Reader:
    """For a folder or a hub id.

    Args:
        location: of the files.
        what: they belong to, where that is not the model itself ("its autoencoder ").
    """
    return folder_reader(Path(location)) if Path(location).is_dir() else _hub_reader(location, what)


def folder_reader(folder: Path) -> Reader:
    def read(name: str) -> dict[str, Any] | None:
        try:
            return _content(folder / name, name, folder)
        except FileNotFoundError:
            return None

    return read


def _content(file: Path, name: str, place: str | Path) -> dict[str, Any]:
    """Names and values in a file.

    Raises:
        FileNotFoundError: there is none.
        BadInput: it cannot be read.
    """
    try:
        return object_in(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise BadInput("model", f"{name} cannot be read as JSON ({error})", value=place) from error


def _hub_reader(repository: str, what: str) -> Reader:
    import huggingface_hub as hub
    from huggingface_hub import errors

    from ...pipelines.errors import first_line

    def read(name: str) -> dict[str, Any] | None:
        try:
            file = hub.hf_hub_download(repository, name)
        except errors.EntryNotFoundError as error:
            # The offline sibling of this error means "not in the cache", which says nothing about the repository.
            if not isinstance(error, errors.LocalEntryNotFoundError):
                return None
            problem = f"{what}{name} is not in the local cache and the hub cannot be reached"
            raise BadInput("model", problem, value=repository) from error
        except errors.RepositoryNotFoundError as error:
            problem = f"{what}the hub has no such public model, and no folder here has this name"
            raise BadInput("model", problem, value=repository) from error
        except (OSError, errors.HfHubHTTPError) as error:
            problem = f"{what}{name} cannot be fetched from the hub ({first_line(error)})"
            raise BadInput("model", problem, value=repository) from error
        return _content(Path(file), f"{what}{name}", repository)

    return read
