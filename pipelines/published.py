"""The layouts in which DC-VideoGen is published, as one diffusers repository.

Published are `transformer_t2v/` and `transformer_i2v/` (or `transformer/`), `text_encoder/`, `tokenizer/`,
`scheduler/`, the autoencoder as a `.pt` file, and for image to video a CLIP `.pth`; some repositories have the
transformer alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..autoencoders import AutoencoderDCV
from ..autoencoders.convert import CheckpointError, load_published
from .adapted import is_adapter, load_adapted
from .open_clip import convert_image_encoder

logger = logging.getLogger(__name__)

# Components that are published as diffusers and transformers save them, with the file that shows it.
_SHARED = {
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_IMAGE = {"image_encoder": "config.json", "image_processor": "preprocessor_config.json"}
# Older and newer spelling of the autoencoder's name.
_AUTOENCODERS = ("dc-ae-v-*.pt", "dc-ae-v-*.safetensors", "*.pt")


class LayoutError(ValueError):
    """A folder that is no DC-VideoGen model; the message says what is missing and how to give it."""


class PublishedLayoutMixin:
    """Gives a pipeline class a `from_pretrained` that also takes the published layouts."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load a pipeline. Arguments are those of `DiffusionPipeline.from_pretrained`, and:

        Args:
            autoencoder: file or folder of the DC-AE-V where the model has none.
            base: folder or hub id of the Wan pipeline that has the text encoder and whatever else the model lacks.

        A folder with adapter-only weights is loaded onto its base model (see `pipelines.adapted`).
        A published layout is converted once into a cache (`VIDACCEL_CACHE`, else `~/.cache/vidaccel`), in which large
        files that need no conversion are links.

        Raises:
            LayoutError: neither a diffusers pipeline nor a published layout.
            CheckpointError: an autoencoder of another variant, or a damaged one.
        """
        parts = {name: kwargs.pop(name, None) for name in ("autoencoder", "base")}
        folder = _local_folder(str(pretrained_model_name_or_path), kwargs)
        if folder is not None and is_adapter(folder):
            return load_adapted(cls, folder, **parts, **kwargs)
        if folder is not None and not (folder / "model_index.json").is_file():
            return super().from_pretrained(cached_conversion(folder, cls.__name__, **parts), **kwargs)
        unused = [f"{name}=" for name, value in parts.items() if value is not None]
        if unused:
            raise LayoutError(
                f"{pretrained_model_name_or_path} is loaded as a diffusers pipeline, which has no use for "
                f"{' and '.join(unused)}: give components instead, such as vae=."
            )
        if folder is not None:
            pretrained_model_name_or_path = folder
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def _local_folder(location: str, options: dict[str, Any]) -> Path | None:
    """The folder with a model, downloaded where it is a hub id of a published layout; None where diffusers knows."""
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    chosen = {k: options[k] for k in ("cache_dir", "revision", "token", "local_files_only") if k in options}
    try:
        hub.hf_hub_download(location, "model_index.json", **chosen)
    except HFValidationError:
        raise LayoutError(f"{location} is neither a folder nor the name of a model on the hub.") from None
    except LocalEntryNotFoundError:
        return _downloaded(location, chosen)
    except EntryNotFoundError:
        return Path(hub.snapshot_download(location, **chosen))
    return None


def _downloaded(location: str, options: dict[str, Any]) -> Path | None:
    """Without the hub: the folder of a published layout that was downloaded before. None leaves it to diffusers."""
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(hub.snapshot_download(location, **{**options, "local_files_only": True}))
    except LocalEntryNotFoundError:
        return None
    return folder if any(folder.glob("transformer*/config.json")) else None


def cached_conversion(
    source: Path, pipeline_class: str, autoencoder: str | Path | None = None, base: str | Path | None = None
) -> Path:
    """Convert a published layout into the cache, or find it there. Arguments and errors of `convert_repository`."""
    stamp = [pipeline_class]
    for place in (source, autoencoder, base):
        stamp += _stamps(place)
    key = hashlib.sha256("\n".join(stamp).encode()).hexdigest()[:16]
    root = Path(os.environ.get("VIDACCEL_CACHE", "~/.cache/vidaccel")).expanduser()
    target = root / "converted" / f"{source.name}-{key}"
    if not (target / "model_index.json").is_file():
        logger.warning("%s is in a published layout: converting it once, into %s.", source, target)
        try:
            convert_repository(source, target, pipeline_class, autoencoder=autoencoder, base=base, link=True)
        except (LayoutError, OSError):
            # Another process, such as the next rank of a launch, may have put it there first.
            if not (target / "model_index.json").is_file():
                raise
    return target


def _stamps(place: str | Path | None) -> list[str]:
    """Path, size and time of a file, or of all files in a folder; the name alone of what is not on this machine."""
    path = Path(place or "").expanduser().resolve()
    if place is None or not path.exists():
        return [str(place)]
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [str(path), *(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)]


def convert_repository(
    source: Path,
    target: Path,
    pipeline_class: str = "DCVideoGenPipeline",
    *,
    autoencoder: str | Path | None = None,
    base: str | Path | None = None,
    link: bool = False,
) -> Path:
    """Write a published layout as one folder that `from_pretrained` of `pipeline_class` loads.

    Everything is checked before anything is written; `target` appears at the end, whole.

    Args:
        source: the published folder.
        target: the new folder; must not exist.
        pipeline_class: `DCVideoGenPipeline` or `DCVideoGenImageToVideoPipeline`.
        autoencoder: DC-AE-V file, or folder of an `AutoencoderDCV`, where `source` has none.
        base: folder or hub id of a Wan pipeline that has the components `source` lacks.
        link: link folders that need no conversion instead of copying them.

    Raises:
        LayoutError: something is missing or does not fit together.
        CheckpointError: see `vidaccel.autoencoders.convert`.
    """
    image = pipeline_class == "DCVideoGenImageToVideoPipeline"
    if target.exists():
        raise LayoutError(f"{target} exists already: give a new folder, or delete it first.")
    if not source.is_dir():
        raise LayoutError(f"{source} is no folder.")
    transformer = _find_transformer(source, image)
    config = _read(transformer / "config.json")
    autoencoder_path = _find_autoencoder(source, autoencoder)
    folders, clip = _find_components(source, base, image and config.get("image_dim") is not None)
    vae = None if autoencoder_path.is_dir() else load_published(autoencoder_path)
    channels = vae.config.latent_channels if vae else _read(autoencoder_path / "config.json").get("latent_channels")
    _check_transformer(config, channels, image, transformer)

    with beside(target) as draft:
        for name, folder in {**folders, "transformer": transformer}.items():
            _take(folder, draft / name, link)
        if vae is None:
            _take(autoencoder_path, draft / "vae", link)
        else:
            vae.save_pretrained(draft / "vae")
        if clip is not None:
            convert_image_encoder(clip, draft)
        index = _model_index(draft, pipeline_class)
        (draft / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return target


def _find_transformer(source: Path, image: bool) -> Path:
    names = ("transformer_i2v" if image else "transformer_t2v", "transformer")
    for name in names:
        if (source / name / "config.json").is_file():
            return source / name
    raise LayoutError(
        f"{source} holds neither model_index.json nor {' nor '.join(f'{n}/config.json' for n in names)}: it is no "
        f"DC-VideoGen model {'for image to video' if image else 'for text to video'}."
    )


def _find_autoencoder(source: Path, given: str | Path | None) -> Path:
    if given is not None:
        path = Path(given).expanduser()
        if path.is_file() or (path / "config.json").is_file():
            return path
        raise LayoutError(f"autoencoder: {path} is neither a file nor a folder with config.json.")
    if (source / "vae" / "config.json").is_file():
        return source / "vae"
    for pattern in _AUTOENCODERS:
        found = sorted(source.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise LayoutError(f"{source} has several autoencoders ({names}): choose one with autoencoder=.")
        if found:
            return found[0]
    raise LayoutError(
        f"{source} has no autoencoder (dc-ae-v-*.pt): give its file with autoencoder=, for example that of "
        "dc-ai/dc-ae-v-1.0-f32t4c32."
    )


def _find_components(source: Path, base: str | Path | None, image: bool) -> tuple[dict[str, Path], Path | None]:
    """Folders by component, and the CLIP file where the image encoder has to come from it."""
    wanted = {**_SHARED, **(_IMAGE if image else {})}
    found: dict[str, Path] = {}
    places = [source] + ([_base_folder(base, list(wanted))] if base is not None else [])
    for name, marker in wanted.items():
        for place in places:
            if (place / name / marker).is_file():
                found.setdefault(name, place / name)
    clip = None
    if image and "image_encoder" not in found:
        clip = next(iter(sorted(source.glob("*clip*.pth"))), None)
    missing = [n for n in wanted if n not in found and not (clip is not None and n in _IMAGE)]
    if missing:
        example = "I2V-14B-720P" if image else "T2V-14B"
        raise LayoutError(
            f"{source} lacks {', '.join(missing)}: give the Wan pipeline they come from with base=, for example "
            f"base='Wan-AI/Wan2.1-{example}-Diffusers'."
        )
    return found, clip


def _base_folder(base: str | Path, components: list[str]) -> Path:
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    import huggingface_hub as hub

    return Path(hub.snapshot_download(str(base), allow_patterns=[f"{name}/*" for name in components]))


def _check_transformer(config: dict[str, Any], channels: int | None, image: bool, folder: Path) -> None:
    wanted = {
        "_class_name": "WanTransformer3DModel",
        "in_channels": None if channels is None else (2 * channels + 4 if image else channels),
        "out_channels": channels,
    }
    for name, value in wanted.items():
        if value is not None and config.get(name) != value:
            raise LayoutError(
                f"{folder}/config.json has {name} {config.get(name)!r}, but with an autoencoder of {channels} latent "
                f"channels {'an image' if image else 'a text'}-to-video model needs {value!r}."
            )


def _model_index(draft: Path, pipeline_class: str) -> dict[str, Any]:
    from diffusers import __version__

    classes = {
        # diffusers looks for ModelMixin in the module too, so the package alone would not do.
        "vae": [AutoencoderDCV.__module__, AutoencoderDCV.__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", _read(draft / "scheduler" / "scheduler_config.json").get("_class_name")],
        "transformer_2": [None, None],
    }
    tokenizer = _read(draft / "tokenizer" / "tokenizer_config.json").get("tokenizer_class")
    if tokenizer:
        classes["tokenizer"] = ["transformers", tokenizer]
    if pipeline_class == "DCVideoGenImageToVideoPipeline":
        present = (draft / "image_encoder").is_dir()
        classes["image_encoder"] = ["transformers", "CLIPVisionModel"] if present else [None, None]
        classes["image_processor"] = ["transformers", "CLIPImageProcessor"] if present else [None, None]
    settings = {"boundary_ratio": None, "expand_timesteps": False}
    return {"_class_name": pipeline_class, "_diffusers_version": __version__, **classes, **settings}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayoutError(f"{path} cannot be read as JSON: {error}") from error


def _take(folder: Path, target: Path, link: bool) -> None:
    if link:
        try:
            target.symlink_to(folder.resolve(), target_is_directory=True)
            return
        except OSError:
            logger.info("%s cannot be linked here, so it is copied.", folder)
    shutil.copytree(folder, target)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `target` at the end, or vanishes on an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        os.replace(draft, target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


__all__ = [
    "CheckpointError",
    "LayoutError",
    "PublishedLayoutMixin",
    "beside",
    "cached_conversion",
    "convert_repository",
]
