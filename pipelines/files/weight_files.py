"""The files of a pipeline's transformer, in a folder or of the hub, and a hash of what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..deep_compression.adapter_folder import FACTS_FILE, FULL_FILE, LORA_FILE, base_location, is_adapter, read_facts
from ..errors import first_line
from .locations import is_hub_id
from .plain_content import object_in

if TYPE_CHECKING:
    import torch

WEIGHTS = "diffusion_pytorch_model.safetensors"


class HubError(OSError):
    """A file of the hub of which nobody can tell whether it is there; says why."""


def transformer_files(base: str, part: str = "transformer", samples: int = 16) -> str:
    """A hash of what a transformer of a pipeline is, from a folder or the hub: equal wherever its files lie.

    Of each file of weights, the size and `samples` evenly spaced parts of 4 KiB count; the first has the names. Of
    adapter-only weights, their own files and those of their base.

    Raises:
        AdapterError: an `adapter.json` that cannot be read.
    """
    digest = hashlib.sha256(json.dumps(stated_config(base, part) or {}, sort_keys=True).encode())
    for path in _weights(base, part):
        add_samples(digest, path, samples)
    return digest.hexdigest()[:16]


def add_samples(digest: Any, path: Path, samples: int = 16) -> None:
    """Take the size of a file and `samples` evenly spaced parts of 4 KiB into a hash."""
    size = path.stat().st_size
    digest.update(f"{size}".encode())
    with open(path, "rb") as file:
        for number in range(samples):
            file.seek(size * number // samples)
            digest.update(file.read(4096))


def stated_config(base: str, part: str = "transformer") -> dict[str, Any] | None:
    """The config of a transformer of a pipeline, without what diffusers notes of its own; None where there is none.

    Raises:
        AdapterError: an `adapter.json` that cannot be read.
        ValueError: so is the config.
    """
    folder = adapter_folder(base)
    if folder is not None:
        stated = read_facts(folder)["transformer"] if part == "transformer" else None
    else:
        file = transformer_file(base, "config.json", part)
        try:
            stated = None if file is None else object_in(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    return None if stated is None else {k: v for k, v in stated.items() if k[0] != "_"}


def adapter_folder(base: str) -> Path | None:
    """The folder of adapter-only weights that are there or on the hub; None for a pipeline, or nothing."""
    if Path(base).is_dir():
        return Path(base) if is_adapter(Path(base)) else None
    if _hub_file(base, "model_index.json") is not None:
        return None
    facts = _hub_file(base, FACTS_FILE)
    return None if facts is None else facts.parent


def _weights(base: str, part: str) -> Iterator[Path]:
    folder = adapter_folder(base)
    if folder is not None:
        yield from _weights(base_location(read_facts(folder)["base"]), part)
        yield from (folder / name for name in (FULL_FILE, LORA_FILE) if (folder / name).is_file())
        return
    index = transformer_file(base, f"{WEIGHTS}.index.json", part)
    names = [WEIGHTS]
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [file for name in names if (file := transformer_file(base, name, part)) is not None]
    if not found:  # those of a variant, or not of safetensors
        found = sorted(file for kind in ("safetensors", "bin") for file in _variants(base, part, kind))
    yield from found


def _variants(base: str, part: str, kind: str = "safetensors") -> list[Path]:
    """The files of weights of a transformer in a folder, under whatever variant's names."""
    return sorted((Path(base) / part).glob(f"{WEIGHTS.partition('.')[0]}*.{kind}"))


def transformer_tensors(base: str, chosen: Callable[[str], bool], part: str = "transformer") -> dict[str, torch.Tensor]:
    """The tensors of a transformer whose names are chosen, without reading others; empty where it has no safetensors.

    Args:
        base: folder or hub id of the pipeline.
        chosen: whether a name is.
        part: name of the transformer in it.
    """
    from safetensors import safe_open

    names = _safetensors(base, part, chosen)
    found: dict[str, torch.Tensor] = {}
    for path in (transformer_file(base, name, part) for name in names):
        if path is None:
            return {}
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if chosen(name)}  # noqa: SIM118
    return found


def transformer_shapes(base: str, part: str = "transformer") -> dict[str, list[int]]:
    """The shapes of the tensors of a transformer by their names in its files, read from the headers alone; empty where
    it has no safetensors, or not all of them."""
    from safetensors import safe_open

    found: dict[str, list[int]] = {}
    for name in _safetensors(base, part):
        path = transformer_file(base, name, part)
        if path is None:
            return {}
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return found


def weights_of(base: str, part: str = "transformer") -> list[Path]:
    """The safetensors files of a transformer of a pipeline, in a folder or of the hub, as far as they are there."""
    found = (transformer_file(base, name, part) for name in _safetensors(base, part))
    return [path for path in found if path is not None]


def transformer_names(base: str, part: str = "transformer") -> frozenset[str]:
    """The names of the tensors of a transformer, of the hub only from its index: no weights are downloaded for it.

    Of damaged files there are none: what loads them says so.

    Raises:
        HubError: the hub cannot be asked.
    """
    from safetensors import SafetensorError

    index = transformer_file(base, f"{WEIGHTS}.index.json", part)
    try:
        if index is not None:
            return frozenset(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        return frozenset(transformer_shapes(base, part) if Path(base).is_dir() else ())
    except (SafetensorError, ValueError, KeyError):
        return frozenset()


def _safetensors(base: str, part: str, chosen: Callable[[str], bool] = lambda name: True) -> list[str]:
    """Names of the files of a transformer with the tensors that are chosen."""
    index = transformer_file(base, f"{WEIGHTS}.index.json", part)
    if index is None:
        of_variant = [] if (Path(base) / part / WEIGHTS).is_file() else [path.name for path in _variants(base, part)]
        return of_variant or [WEIGHTS]
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted({file for name, file in places.items() if chosen(name)})


def transformer_file(base: str, name: str, part: str = "transformer") -> Path | None:
    """A file of a transformer, from a folder or the hub; the part is "" where it is alone there.

    Args:
        base: folder, hub id, or hub id with a revision, "owner/name@revision".
        name: of the file. part: name of the transformer in the pipeline.

    Raises:
        HubError: nobody can tell whether the file is there.
    """
    if Path(base).is_dir():
        path = Path(base) / part / name
        return path if path.is_file() else None
    return _hub_file(base, f"{part}/{name}" if part else name)


def _hub_file(base: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = base.partition("@")
    if not is_hub_id(repository):  # a folder that was moved
        return None
    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except (OSError, ValueError, EntryNotFoundError) as error:
        # The sibling of this error for a file that is not in the cache says nothing about the hub.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise HubError(f"{name} of {base} cannot be had from the hub ({first_line(error)})") from error
