"""Where a model is: one that is built in, a folder, a hub id; and a published layout that is converted first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .files import Reader

DEMOS = ("demo", "demo-dc")
_PUBLISHED = ("transformer_t2v", "transformer_i2v")


def locate(model: str) -> str:
    """Folder or hub id of a model; of the folder of a training, what is in it, see `run_folder.model_path`."""
    from ...pipelines.files.locations import is_hub_id

    if model in DEMOS:
        from ... import demo

        try:
            return str(demo.path(model))
        except OSError as error:
            raise BadInput("model", str(error).rstrip("."), value=model) from error
    if os.path.isdir(os.path.expanduser(model)):
        from ...pipelines.files.run_folder import NoAdapter, model_path

        try:
            return str(model_path(model))
        except NoAdapter as error:
            raise BadInput("model", str(error).rstrip("."), value=model) from error
    if is_hub_id(model):
        return model
    known = " nor ".join(f'"{name}"' for name in DEMOS)
    problem = f"it is neither {known}, nor a folder here, nor a hub id of the form owner/name"
    raise BadInput("model", problem, value=model)


def published_class(read: Reader, image: bool) -> str | None:
    """The pipeline class of a model in a published layout; None for what is in none."""
    there = [name for name in _PUBLISHED if read(f"{name}/config.json") is not None]
    config = read("transformer/config.json")
    if not there and config is not None and config.get("patch_size") == [1, 1, 1]:
        there = [_PUBLISHED[config.get("in_channels") != config.get("out_channels")]]
    if not there:
        return None
    name = _PUBLISHED[image] if len(there) > 1 else there[0]
    return "DCVideoGenPipeline" if name == _PUBLISHED[0] else "DCVideoGenImageToVideoPipeline"


def no_pipeline(read: Reader) -> tuple[str, str]:
    """What a folder without model_index.json is, and what to give instead."""
    kind = str((read("config.json") or {}).get("_class_name", ""))
    if kind == "WanModel":
        fix = "Give the same model for diffusers, whose name on the hub ends in -Diffusers."
        return "it is in the layout in which Wan is published, and no diffusers pipeline", fix
    if kind.endswith("Transformer3DModel"):
        return (
            "it is a transformer alone",
            "Give the folder of the pipeline, which has model_index.json and all other parts.",
        )
    if read("transformer/config.json") is not None:
        fix = "Give a whole one: model_index.json says what belongs to it."
        return "it is no diffusers pipeline: it has no model_index.json beside its transformer", fix
    return "it is no diffusers pipeline: it has no model_index.json", "Give the folder that holds it."


def converted(model: str, location: str, pipeline_class: str) -> str:
    """The folder of a published model in diffusers' layout, of what is on this machine."""
    from ...pipelines.deep_compression.published import cached_conversion
    from ...pipelines.deep_compression.published_hub import downloaded_folder, known_parts
    from ...pipelines.errors import first_line

    fix = f'Convert it once with "vidaccel convert {model} NEW_FOLDER", and give NEW_FOLDER.'
    folder = Path(location) if Path(location).is_dir() else downloaded_folder(location)
    if folder is None:
        raise BadInput("model", "it is in the layout in which DC-VideoGen is published", fix, value=model)
    try:
        parts: dict[str, Any] = known_parts(location, folder)
        return str(cached_conversion(folder, pipeline_class, **parts, options={"local_files_only": True}))
    except ValueError as error:
        raise BadInput("model", first_line(error).rstrip("."), fix, value=model) from error
