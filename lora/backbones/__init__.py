"""Model families, one file each: as they are (`OWN_FAMILIES`), and moved to another autoencoder (`FAMILIES`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...generation.models.files import folder_reader
from ...generation.models.places import no_pipeline
from ...generation.rows import find_row
from ...pipelines.deep_compression.adapter_folder import AdapterError, is_adapter, is_of_pictures, read_facts
from ...pipelines.files.missing_weights import missing_weights
from ..config import ConfigError
from ..named_class import Row, named_class
from .base import Backbone, ModelOptions, OwnModel

FAMILIES: dict[str, Row] = {
    "WanPipeline": ("wan", "WanBackbone"),
    "WanImageToVideoPipeline": ("wan", "WanBackbone"),
    "FluxPipeline": ("flux", "FluxBackbone"),
    "SanaPipeline": ("sana", "SanaBackbone"),
}
"""Class of the base pipeline -> (module, class), for models that are moved to another autoencoder."""

OWN_FAMILIES: dict[str, Row] = {
    "WanPipeline": ("wan_own", "WanModel"),
    "WanImageToVideoPipeline": ("wan_own", "WanModel"),
    "DCVideoGenPipeline": ("wan_dc", "DCWanModel"),
    "DCVideoGenImageToVideoPipeline": ("wan_dc", "DCWanModel"),
    "FluxPipeline": ("flux", "FluxModel"),
    "SanaPipeline": ("sana", "SanaModel"),
    "HunyuanVideoPipeline": ("hunyuan_own", "HunyuanVideoModel"),
    "HunyuanVideoImageToVideoPipeline": ("hunyuan_image_own", "HunyuanVideoImageModel"),
    "CogVideoXPipeline": ("cogvideox_own", "CogVideoXModel"),
    "CogVideoXImageToVideoPipeline": ("cogvideox_own", "CogVideoXModel"),
    "LTXPipeline": ("ltx_own", "LTXModel"),
    "LTXImageToVideoPipeline": ("ltx_own", "LTXModel"),
    "LTXConditionPipeline": ("ltx_own", "LTXConditionModel"),
    "LTX2Pipeline": ("ltx2_own", "LTX2Model"),
    "LTX2ImageToVideoPipeline": ("ltx2_own", "LTX2Model"),
}
"""The same for models as they are. A family is one more file and one line here; of one of somebody's own, the class, or
"package.module:Class"."""


def open_backbone(base: str, autoencoder: str, **options: Any) -> Backbone:
    """A base pipeline that is moved to another autoencoder.

    Args:
        base: folder or hub id.
        autoencoder: folder or hub id of the new one.
        options: arguments of the backbone's class.

    Raises:
        ConfigError: no pipeline, one of another family, or parts that do not fit.
    """
    return _with_rate(_class_of(base, FAMILIES, "ae_adapt")(base, autoencoder, **options))


def open_model(base: str, recipe: str, options: ModelOptions | None = None) -> OwnModel:
    """A base pipeline as it is.

    Args:
        base: folder or hub id.
        recipe: that asks for it, for messages.
        options: how it is trained; None for the defaults.

    Raises:
        ConfigError: no pipeline, one of another family, or an option that it does not have.
    """
    return _with_rate(_class_of(base, OWN_FAMILIES, recipe)(base, options or ModelOptions()))


def _with_rate(model: Any) -> Any:
    """The model, with the frame rate of its pipeline where that makes videos; of the clips, where it is told that."""
    from diffusers import DiffusionPipeline

    index = {} if is_adapter(Path(model.base)) else DiffusionPipeline.load_config(model.base)
    row = find_row(_class_name(model.base), model.config, index)
    told = getattr(model, "fps", None) if row is not None and row.rate else None
    model.rate = None if row is None else told or row.fps
    return model


def _class_name(base: str) -> str:
    if not is_adapter(Path(base)):
        return _stated_class(base)
    try:
        facts = read_facts(Path(base))
    except AdapterError as error:
        raise ConfigError(f"model.base: {error}") from error
    return "DCGenPipeline" if is_of_pictures(facts["transformer"]) else "DCVideoGenPipeline"


def _class_of(base: str, families: Mapping[str, Row], recipe: str) -> Any:
    name = _class_name(base)
    if name not in families:
        raise ConfigError(f"model.base: {base} is a {name}; {recipe} takes {', '.join(families)}.")
    if lacking := missing_weights(base):
        raise ConfigError(f"model.base: {base} is not whole: {lacking}. Download it again.")
    return named_class(families[name], __name__)


def _stated_class(base: str) -> str:
    from diffusers import DiffusionPipeline

    try:
        name = DiffusionPipeline.load_config(base)["_class_name"]
    except (OSError, ValueError) as error:
        if Path(base).is_dir() and not (Path(base) / "model_index.json").exists():
            problem, fix = no_pipeline(folder_reader(Path(base)))
            raise ConfigError(f"model.base: {base}: {problem}. {fix}") from error
        raise ConfigError(f"model.base: {base} has no readable model_index.json: {error}") from error
    return name[-1] if isinstance(name, list) else name
