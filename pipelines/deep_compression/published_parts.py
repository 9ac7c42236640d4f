"""Find the components of a published DC-VideoGen model and check that they fit, before weights are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...autoencoders import AutoencoderDCV
from .adapter_folder import DEFAULTS_FILE, FACTS_FILE, FULL_FILE, LORA_FILE, is_adapter
from .published_files import AUTOENCODER_FILES, LayoutError, base_folder, find_autoencoder, own_autoencoder, read_json

IMAGE_CLASS = "DCVideoGenImageToVideoPipeline"
# Components that are published as diffusers and transformers save them, with the file that shows it.
_SHARED = {
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_IMAGE = {"image_encoder": "config.json", "image_processor": "preprocessor_config.json"}
COMPONENTS = frozenset({"transformer", "vae", *_SHARED, *_IMAGE})
_CLIP = "*clip*.pth"


@dataclass(frozen=True)
class Parts:
    """Where the components of a published model are; None for those that it is to do without.

    Args:
        transformer: folder.
        config: of the transformer.
        autoencoder: file, or folder of an `AutoencoderDCV`.
        others: folders by component.
        clip: file of the image encoder.
        base: the folder that others are from, downloaded where it is on the hub; None where none was needed.
    """

    transformer: Path | None
    config: dict[str, Any]
    autoencoder: Path | None
    others: dict[str, Path]
    clip: Path | None
    base: Path | None


def wanted_files(pipeline_class: str, without: Collection[str] = ()) -> dict[str, list[str]]:
    """Which files of a repository a pipeline is made of, as arguments of `snapshot_download`.

    Args:
        without: components that are not needed.
    """
    image = pipeline_class == IMAGE_CLASS
    patterns = [FACTS_FILE, FULL_FILE, LORA_FILE, DEFAULTS_FILE]
    if "transformer" not in without:
        patterns += [f"{name}/*" for name in _transformer_names(image)]
    patterns += [f"{name}/*" for name in (*_SHARED, *(_IMAGE if image else ())) if name not in without]
    if "vae" not in without:
        patterns += ["vae/*", *AUTOENCODER_FILES]
    if image and not set(without) >= set(_IMAGE):
        patterns.append(_CLIP)
    # Without this, "*.pt" would mean files in every folder.
    return {"allow_patterns": patterns, "ignore_patterns": ["*/*.pt"]}


def find_parts(
    source: Path,
    pipeline_class: str,
    *,
    autoencoder: str | Path | None = None,
    base: str | Path | None = None,
    without: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Parts:
    """Find the components. Arguments and errors of `convert_repository`; what is on the hub is downloaded."""
    image, options = pipeline_class == IMAGE_CLASS, options or {}
    _check_source(source)
    transformer, config = None, {}
    if "transformer" not in without:
        transformer = _find_transformer(source, image)
        config = read_json(transformer / "config.json")
        # Before anything is downloaded, with the channels that it says itself.
        check_transformer(config, config.get("out_channels"), image, transformer)
        if not any(transformer.glob("diffusion_pytorch_model*")):
            raise LayoutError(f"{transformer} has no weights (diffusion_pytorch_model*): download it as a whole.")
    place = None if "vae" in without else _find_autoencoder(source, autoencoder, options)
    needs_image = image and config.get("image_dim") is not None
    wanted = {**_SHARED, **(_IMAGE if needs_image or (image and transformer is None) else {})}
    wanted = {name: marker for name, marker in wanted.items() if name not in without}
    others = {name: source / name for name, marker in wanted.items() if (source / name / marker).is_file()}
    missing = [name for name in wanted if name not in others]
    clip = next(iter(sorted(source.glob(_CLIP))), None) if set(missing) & set(_IMAGE) else None
    if clip is not None:
        missing = [name for name in missing if name not in _IMAGE]
    folder = base_folder(base, missing, options) if base is not None and missing else None
    if folder is not None:
        others |= {name: folder / name for name in missing if (folder / name / wanted[name]).is_file()}
    # A transformer that is given later may do without an image encoder.
    missing = [name for name in missing if name not in others and (needs_image or name not in _IMAGE)]
    if missing:
        example = "I2V-14B-720P" if image else "T2V-14B"
        raise LayoutError(
            f"{source} lacks {', '.join(missing)}: give the Wan pipeline they come from with base=, for example "
            f"base='Wan-AI/Wan2.1-{example}-Diffusers'."
        )
    if "scheduler" in others:
        _check_scheduler(others["scheduler"])
    return Parts(transformer, config, place, others, clip, folder)


def only_autoencoder(folder: Path) -> Path | None:
    """The published file in a folder that has nothing else of a model; None in others.

    Raises:
        LayoutError: there are several.
    """
    if (folder / "model_index.json").is_file() or is_adapter(folder) or any(folder.glob("*/config.json")):
        return None
    found = own_autoencoder(folder)
    return found if found != folder else None


def check_transformer(config: dict[str, Any], channels: int | None, image: bool, folder: Path) -> None:
    """LayoutError for a transformer of another kind than one for latents of so many channels."""
    wanted = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 1, 1],
        "in_channels": None if channels is None else (2 * channels + 4 if image else channels),
        "out_channels": channels,
    }
    for name, value in wanted.items():
        if value is not None and config.get(name) != value:
            raise LayoutError(
                f"{folder}/config.json has {name} {config.get(name)!r}, but with an autoencoder of {channels} latent "
                f"channels {'an image' if image else 'a text'}-to-video model needs {value!r}."
            )


def _check_source(source: Path) -> None:
    """Folders of other kinds are said to be what they are."""
    if not source.is_dir():
        raise LayoutError(f"{source} is no folder.")
    if (source / "model_index.json").is_file():
        raise LayoutError(f"{source} is a diffusers pipeline already (model_index.json): it needs no conversion.")
    if (source / "pipeline" / "model_index.json").is_file():
        raise LayoutError(f"{source} is the folder of a training, whose model is {source / 'pipeline'}: give that.")
    if is_adapter(source):
        raise LayoutError(
            f"{source} is an adapter (adapter.json), which Python's from_pretrained and `vidaccel generate` take as it "
            "is: there is nothing to convert."
        )
    file = source / "config.json"
    if file.is_file() and read_json(file).get("_class_name") == AutoencoderDCV.__name__:
        raise LayoutError(
            f"{source} is the folder of an AutoencoderDCV: to convert it to a published file, give that a name that "
            "ends in .pt or .safetensors."
        )


def _transformer_names(image: bool) -> tuple[str, str]:
    return "transformer_i2v" if image else "transformer_t2v", "transformer"


def _find_transformer(source: Path, image: bool) -> Path:
    names = _transformer_names(image)
    for name in names:
        if (source / name / "config.json").is_file():
            return source / name
    files = [path.name for pattern in AUTOENCODER_FILES[:2] for path in sorted(source.glob(pattern))]
    also = f" It holds an autoencoder, {files[0]}, which `vidaccel convert` converts alone." if files else ""
    raise LayoutError(
        f"{source} holds neither model_index.json nor {' nor '.join(f'{n}/config.json' for n in names)}: it is no "
        f"DC-VideoGen model {'for image to video' if image else 'for text to video'}.{also}"
    )


def _find_autoencoder(source: Path, given: str | Path | None, options: Mapping[str, Any]) -> Path:
    if given is not None:
        return find_autoencoder(given, options)
    if (source / "vae" / "config.json").is_file():
        return source / "vae"
    found = own_autoencoder(source)
    if found is None:
        raise LayoutError(
            f"{source} has no autoencoder (dc-ae-v-*.pt): give its file, folder or hub id with autoencoder=, for "
            "example autoencoder='dc-ai/dc-ae-v-1.0-f32t4c32'."
        )
    return found


def _check_scheduler(folder: Path) -> None:
    file = folder / "scheduler_config.json"
    name = read_json(file).get("_class_name")
    if not isinstance(name, str):
        raise LayoutError(
            f"{file} has the _class_name {name!r}, but it must name a scheduler of diffusers, such as "
            "UniPCMultistepScheduler."
        )
