"""Published DC-VideoGen models on the hub: what is downloaded, and which repositories belong together."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import first_line
from .adapter_folder import is_adapter
from .published_files import LayoutError, hub_options, own_autoencoder
from .published_parts import wanted_files

logger = logging.getLogger(__name__)

# Repositories with a transformer alone: the autoencoder and the base that it was made with.
_KNOWN = {
    "dc-ai/DC-Gen-Wan2.1-T2V-14B": ("dc-ai/dc-ae-v-1.0-f32t4c32", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    "dc-ai/DC-Gen-Wan2.1-I2V-14B": ("dc-ai/dc-ae-v-1.0-f32t4c32", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
}


def published_folder(
    location: str, pipeline_class: str, options: Mapping[str, Any] | None = None, without: Collection[str] = ()
) -> Path | None:
    """The folder with a model, downloaded where it is a hub id of a published layout; None where diffusers knows.

    Args:
        location: folder or hub id.
        pipeline_class: whose files are downloaded.
        options: arguments of `from_pretrained` that say how to reach the hub; others do not matter.
        without: components that need not be downloaded.

    Raises:
        LayoutError: it is neither.
        OSError: the hub has no such repository, or cannot be reached.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    chosen = hub_options(options or {}, "revision")
    return _folder(location, _layout(location, chosen), pipeline_class, chosen, without)


def _folder(
    location: str, layout: str, pipeline_class: str, options: Mapping[str, Any], without: Collection[str]
) -> Path | None:
    """Of a hub id whose `_layout` is known."""
    if layout == "published":
        import huggingface_hub as hub

        chosen: dict[str, Any] = {**wanted_files(pipeline_class, without), **options}
        return Path(hub.snapshot_download(location, **chosen))
    return downloaded_folder(location, options) if layout == "unknown" else None


def fetch_published(location: str, pipeline_class: str, without: Collection[str] = ()) -> Path:
    """As `published_folder`, for a hub id that must be of a published layout.

    Raises:
        LayoutError: the repository is not there, is in diffusers' layout already, or cannot be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        layout = _layout(location, {})
        folder = _folder(location, layout, pipeline_class, {}, without)
    except (OSError, HfHubHTTPError) as error:
        raise LayoutError(
            f"{location} is no folder here and cannot be had from the hub ({first_line(error)})."
        ) from error
    if layout == "diffusers":
        raise LayoutError(f"{location} is a diffusers pipeline already (model_index.json): it needs no conversion.")
    if folder is None:
        raise LayoutError(
            f"{location} is no folder here, was not downloaded before, and the hub cannot be reached: give its folder."
        )
    return folder


def _layout(location: str, options: Mapping[str, Any]) -> str:
    """What the hub has: "diffusers", "published" (or an adapter), "unknown" where it cannot be reached."""
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        hub.hf_hub_download(location, "model_index.json", **options)
    except HFValidationError:
        raise LayoutError(f"{location} is neither a folder nor the name of a model on the hub.") from None
    except LocalEntryNotFoundError:
        return "unknown"
    except EntryNotFoundError:
        return "published"
    return "diffusers"


def downloaded_folder(location: str, options: Mapping[str, Any] | None = None) -> Path | None:
    """Without the hub: the folder of a published layout that was downloaded before; None when there is none."""
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(hub.snapshot_download(location, **{**(options or {}), "local_files_only": True}))
    except LocalEntryNotFoundError:
        return None
    return folder if is_adapter(folder) or any(folder.glob("transformer*/config.json")) else None


def known_parts(
    location: str,
    folder: Path,
    *,
    autoencoder: str | Path | None = None,
    base: str | Path | None = None,
    without: Collection[str] = (),
) -> dict[str, str]:
    """`autoencoder` and `base` of a repository that is known, where they are not given and the repository has none."""
    if location not in _KNOWN:
        return {}
    known = dict(zip(("autoencoder", "base"), _KNOWN[location], strict=True))
    has_one = (folder / "vae" / "config.json").is_file() or own_autoencoder(folder) is not None
    if autoencoder is not None or "vae" in without or has_one:
        del known["autoencoder"]
    if base is not None:
        del known["base"]
    for name, value in known.items():
        logger.info("%s: %s is not given, so it is %s.", location, name, value)
    return known
