"""The layouts in which DC-VideoGen is published, as one diffusers repository.

Published are `transformer_t2v/` and `transformer_i2v/` (or `transformer/`), `text_encoder/`, `tokenizer/`,
`scheduler/`, the autoencoder as a `.pt` file, and for image to video a CLIP `.pth`; some repositories have the
transformer alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...autoencoders import AutoencoderDCV
from ...autoencoders.convert import CheckpointError
from ...autoencoders.dtypes import resolve_dtypes
from ..files.conversions import conversion_place, discard, is_whole, stamps
from ..files.drafts import beside, take
from ..files.json_files import write_json
from ..files.run_folder import NoAdapter, chosen_model
from .adapted import load_adapted
from .adapter_folder import is_adapter
from .open_clip import convert_image_encoder
from .published_files import LayoutError, hub_options, load_autoencoder, read_json, refuse_changes
from .published_hub import known_parts, published_folder
from .published_parts import COMPONENTS, IMAGE_CLASS, check_transformer, find_parts

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # what it is mixed into
    from diffusers import DiffusionPipeline as _Pipeline
else:
    _Pipeline = object

_ARGUMENTS = ("autoencoder", "base", "autoencoder_config")


class PublishedLayoutMixin(_Pipeline):
    """Gives a pipeline class a `from_pretrained` that also takes the published layouts."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load a pipeline. Arguments are those of `DiffusionPipeline.from_pretrained`, and:

        Args:
            autoencoder: the DC-AE-V where the model has none, or another: its file, a folder with it, the folder of an
                `AutoencoderDCV`, or a hub id. Repositories whose own is known need none.
            base: folder or hub id of the Wan pipeline that has the text encoder and whatever else the model lacks.
            autoencoder_config: what the weights of a DC-AE-V file that is none of the published variants do not tell,
                such as `{"chunk_size": 40, "scaling_factor": 0.7}`.

        Components that are given, such as `vae=`, need not be in the model. A dtype may be a name, such as "bfloat16".
        A folder with adapter-only weights is loaded onto its base model (see `pipelines.adapted`); of the folder of a
        training it is the result, or what its newest checkpoint has, and the log says which.
        A published layout is converted once into a cache (`VIDACCEL_CACHE`, else `~/.cache/vidaccel`), in which large
        files that need no conversion are links.

        Raises:
            LayoutError: neither a diffusers pipeline nor a published layout; or a training that has made no model.
            CheckpointError: an autoencoder of another variant, or a damaged one.
            ValueError: a dtype whose name is unknown.
        """
        kwargs = resolve_dtypes(kwargs)
        parts = {name: kwargs.pop(name, None) for name in _ARGUMENTS}
        try:
            location = str(chosen_model(pretrained_model_name_or_path))
        except NoAdapter as error:
            raise LayoutError(str(error)) from error
        given = COMPONENTS & kwargs.keys()
        if parts["autoencoder"] is not None and "vae" in given:
            raise LayoutError("autoencoder= and vae= both give the autoencoder: leave one of them out.")
        unneeded = given if parts["autoencoder"] is None else given | {"vae"}
        folder = published_folder(location, cls.__name__, kwargs, without=unneeded)
        if folder is not None and is_adapter(folder):
            if not Path(location).expanduser().is_dir():
                kwargs.pop("revision", None)  # It was that of the adapter.
            return load_adapted(cls, folder, **parts, **kwargs)
        if folder is not None and not (folder / "model_index.json").is_file():
            parts |= known_parts(location, folder, autoencoder=parts["autoencoder"], base=parts["base"], without=given)
            converted = cached_conversion(folder, cls.__name__, **parts, without=given, options=kwargs)
            return super().from_pretrained(converted, **kwargs)
        unused = [f"{name}=" for name, value in parts.items() if value is not None]
        if unused:
            raise LayoutError(
                f"{pretrained_model_name_or_path} is loaded as a diffusers pipeline, which has no use for "
                f"{' and '.join(unused)}: give components instead, such as vae=."
            )
        if folder is not None:
            pretrained_model_name_or_path = folder
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def cached_conversion(
    source: Path,
    pipeline_class: str,
    autoencoder: str | Path | None = None,
    base: str | Path | None = None,
    *,
    autoencoder_config: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Convert a published layout into the cache, or find it there. Arguments and errors of `convert_repository`."""
    stamp = [pipeline_class]
    for place in (source, autoencoder, base):
        stamp += stamps(place)
    if autoencoder_config:
        stamp.append(repr(sorted(autoencoder_config.items())))
    stamp += sorted(without)
    target = conversion_place(source.name, stamp)
    if is_whole(target):
        return target
    parts = find_parts(
        source, pipeline_class, autoencoder=autoencoder, base=base, without=without, options=hub_options(options or {})
    )
    if is_whole(target):  # Another process was first, or the download brought back what was gone.
        return target
    if target.exists():
        # What it links to is gone, as when the hub's own cache was emptied.
        logger.warning("%s has lost files that it links to: converting it anew.", target)
        discard(target)
    more = [f"{name} {value}" for name, value in (("autoencoder", autoencoder), ("base", base)) if value is not None]
    with_them = f" (with {', '.join(more)})" if more else ""
    logger.warning("%s%s is in a published layout: converting it once, into %s.", source, with_them, target)
    try:
        convert_repository(
            source,
            target,
            pipeline_class,
            autoencoder=parts.autoencoder,
            base=parts.base,
            link=True,
            autoencoder_config=autoencoder_config,
            without=without,
        )
    except (LayoutError, OSError):
        # Another process, such as the next rank of a launch, may have put it there first.
        if not (target / "model_index.json").is_file():
            raise
    return target


def convert_repository(
    source: Path,
    target: Path,
    pipeline_class: str = "DCVideoGenPipeline",
    *,
    autoencoder: str | Path | None = None,
    base: str | Path | None = None,
    link: bool = False,
    autoencoder_config: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write a published layout as one folder that `from_pretrained` of `pipeline_class` loads.

    Everything is checked before anything is written; `target` appears at the end, whole.

    Args:
        source: the published folder.
        target: the new folder; must not exist.
        pipeline_class: `DCVideoGenPipeline` or `DCVideoGenImageToVideoPipeline`.
        autoencoder: where `source` has none, or another: DC-AE-V file, folder with it or of an `AutoencoderDCV`, or
            hub id.
        base: folder or hub id of a Wan pipeline that has the components `source` lacks.
        link: link folders that need no conversion instead of copying them.
        autoencoder_config: fields of the autoencoder that the weights in its file do not tell, such as `chunk_size`.
        without: components that are left out, because they will be given to `from_pretrained`.
        options: `cache_dir`, `token` and `local_files_only` for what is on the hub.

    Raises:
        LayoutError: something is missing or does not fit together.
        CheckpointError: see `vidaccel.autoencoders.convert`.
    """
    if target.exists():
        raise LayoutError(f"{target} exists already: give a new folder, or delete it first.")
    parts = find_parts(source, pipeline_class, autoencoder=autoencoder, base=base, without=without, options=options)
    vae = channels = None
    if parts.autoencoder is not None and parts.autoencoder.is_file():
        vae = load_autoencoder(parts.autoencoder, changes=autoencoder_config)
        channels = vae.config.latent_channels
    elif parts.autoencoder is not None:
        refuse_changes(parts.autoencoder, autoencoder_config)
        channels = read_json(parts.autoencoder / "config.json").get("latent_channels")
    if parts.transformer is not None:
        check_transformer(parts.config, channels, pipeline_class == IMAGE_CLASS, parts.transformer)

    folders = {**parts.others, "transformer": parts.transformer, "vae": None if vae else parts.autoencoder}
    with beside(target) as draft:
        for name, folder in folders.items():
            if folder is not None:
                take(folder, draft / name, link)
        if vae is not None:
            vae.save_pretrained(draft / "vae")
        if parts.clip is not None:
            convert_image_encoder(parts.clip, draft)
        index = _model_index(draft, pipeline_class, without)
        write_json(draft / "model_index.json", index)
    return target


def _model_index(draft: Path, pipeline_class: str, without: Collection[str] = ()) -> dict[str, Any]:
    from diffusers import __version__

    classes = {
        # diffusers looks for ModelMixin in the module too, so the package alone would not do.
        "vae": [AutoencoderDCV.__module__, AutoencoderDCV.__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        # Of components that will be given, diffusers compares only the kind with these.
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer_2": [None, None],
    }
    for name, file, key in (
        ("scheduler", "scheduler_config.json", "_class_name"),
        ("tokenizer", "tokenizer_config.json", "tokenizer_class"),
    ):
        if (draft / name).is_dir() and (stated := read_json(draft / name / file).get(key)):
            classes[name][1] = stated
    if pipeline_class == IMAGE_CLASS:
        for name, own in (("image_encoder", "CLIPVisionModel"), ("image_processor", "CLIPImageProcessor")):
            present = name in without or (draft / name).is_dir()
            classes[name] = ["transformers", own] if present else [None, None]
    settings = {"boundary_ratio": None, "expand_timesteps": False}
    return {"_class_name": pipeline_class, "_diffusers_version": __version__, **classes, **settings}


__all__ = [
    "CheckpointError",
    "LayoutError",
    "PublishedLayoutMixin",
    "cached_conversion",
    "convert_repository",
]
