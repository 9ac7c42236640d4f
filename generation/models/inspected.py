"""A model looked at: what it is and makes by default, from a few kB of JSON, before any weights are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.deep_compression.adapter_folder import DEFAULTS_FILE
from ..errors import BadInput
from ..rows import NOT_RUN, ROWS, PipelineRow, find_row, patch_of
from .facts import DEFAULTS, ModelFacts
from .files import Reader, folder_reader, reader
from .places import DEMOS, converted, locate, no_pipeline, published_class

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


LEARNED_FILES = {"sla": "transformer/sla_config.json", "vsa": "transformer/vsa_config.json"}
"""Method -> what lies beside the weights of a transformer that was trained for it, in older folders; see
`pipelines.trained_for`."""
_LEVELS = {
    "RCMScheduler": ("middle_times", 1),
    "DMDScheduler": ("denoising_timesteps", 0),
    "GridScheduler": ("sigmas", 0),
}
"""Scheduler -> the setting with a level for each step, and steps beside these."""


def inspect_model(model: str, image: bool = False, video: bool = False, last_image: bool = False) -> ModelFacts:
    """Read what a model is, from `model_index.json` or `adapter.json` and the configs of autoencoder and transformer.

    Args:
        model: one of `DEMOS`, a folder that `save_pretrained` of a pipeline wrote or that holds an adapter to another
            autoencoder, the folder of a training that made one, or a hub id "owner/name". A folder in the layout in
            which DC-VideoGen is published is converted into the cache of `from_pretrained` first.
        image, video, last_image: what is given to start from. Of a published folder with two models, a picture takes
            the one for image to video; other models run as the class that takes the same weights and that input.

    Raises:
        BadInput: no such model, a folder that is no pipeline, or a pipeline class that has no row.
    """
    location = locate(model)
    read = reader(location)
    index = read("model_index.json")
    adapter = read("adapter.json") if index is None else None
    if adapter is not None:
        return _adapter_facts(model, location, adapter, read)
    if index is None:
        found = published_class(read, image)
        if found is None:
            raise BadInput("model", *no_pipeline(read), value=model)
        location = converted(model, location, found)
        read = folder_reader(Path(location))
        index = read("model_index.json") or {}
    pipeline_class = index.get("_class_name")
    pipeline_class = pipeline_class[-1] if isinstance(pipeline_class, list) else pipeline_class
    given = {"image": image, "video": video, "last_image": last_image}
    return _facts(model, location, str(pipeline_class), read, index, [name for name, there in given.items() if there])


def inspect_pipeline(pipe: DiffusionPipeline, index: Mapping[str, Any] | None = None) -> ModelFacts:
    """What a loaded pipeline is; see `inspect_model`.

    Args:
        pipe: the pipeline.
        index: config of the one that it was made of, which may say more than its own class can; None for its own.

    Raises:
        BadInput: it is of a class that has no row.
    """
    from ...pipelines.acceleration.families import unwrap

    location = str(getattr(pipe, "name_or_path", None) or type(pipe).__name__)
    name = next((demo for demo in DEMOS if location == locate(demo)), location)

    def read(file: str) -> dict[str, Any] | None:
        if file in (DEFAULTS_FILE, *LEARNED_FILES.values()):
            return folder_reader(Path(location))(file)
        part = unwrap(getattr(pipe, file.partition("/")[0], None))
        config = getattr(part, "config", None)
        return None if config is None else {"_class_name": type(part).__name__, **config}

    index = getattr(pipe, "config", {}) if index is None else index
    return _facts(name, location, type(pipe).__name__, read, dict(index))


def check_packages(facts: ModelFacts) -> None:
    """Raise BadInput where a package that the pipeline needs is not installed."""
    _refuse_missing(facts.name, facts.row)


def _refuse_missing(model: str, row: PipelineRow) -> None:
    from importlib.util import find_spec

    missing = [package for module, package in row.packages.items() if find_spec(module) is None]
    if missing:
        problem = f"a {row.pipeline} needs {' and '.join(missing)}, which is not installed"
        raise BadInput("model", problem, f"pip install {' '.join(missing)}.", value=model)


def variant(facts_class: str, given: Collection[str], index: Mapping[str, Any]) -> str:
    """The class that takes the same weights and what is given; the class itself where there is none, or no need."""
    row = find_row(facts_class, index=index)
    if row is not None:
        for name in ("last_image", "video", "image"):  # the last picture needs more than the first
            if name in given and name not in row.takes and name in row.variants:
                return row.variants[name]
    return facts_class


def _facts(
    model: str,
    location: str,
    pipeline_class: str,
    read: Reader,
    index: Mapping[str, Any],
    given: Collection[str] = (),
) -> ModelFacts:
    """Of a pipeline whose configs can be read."""
    from ...pipelines.loading import call_arguments

    pipeline_class = variant(pipeline_class, given, index)
    if pipeline_class in NOT_RUN:
        raise BadInput("model", f"it is a {pipeline_class}, which is not run: {NOT_RUN[pipeline_class]}", value=model)
    if pipeline_class.endswith("ModularPipeline"):
        problem = (
            f"it is a {pipeline_class}, and modular pipelines are not run: which blocks they have is their maker's"
        )
        raise BadInput("model", problem, "Call it yourself inside `with vidaccel.accelerate(pipe):`.", value=model)
    if pipeline_class == "WanDMDPipeline":
        fix = f'Convert it once with "vidaccel convert fastwan {model} NEW_FOLDER", and give NEW_FOLDER.'
        raise BadInput("model", "it is as FastVideo publishes its models (WanDMDPipeline)", fix, value=model)
    if pipeline_class not in ROWS:
        raise BadInput(
            "model",
            f"it is a {pipeline_class}, which is not supported; supported: {', '.join(sorted(ROWS))}",
            "Another one needs a row in generation/rows: the frames that it makes, its autoencoder's factors, and the "
            "arguments that its call has under other names.",
            value=model,
        )
    transformer = next((c for n in ("transformer", "transformer_2") if (c := read(f"{n}/config.json"))), None)
    vae = read("vae/config.json")
    if transformer is None or vae is None:
        problem = "it is incomplete: it needs vae/config.json and transformer/config.json"
        raise BadInput("model", problem, value=model)
    if "VideoToVideo" in pipeline_class and read("transformer_2/config.json"):
        problem = "it has two transformers, with which diffusers has no video to video"
        raise BadInput("video", f"is of no use: {problem}", "Take a model with one, such as Wan 2.1.")
    row = find_row(pipeline_class, transformer, index)
    assert row is not None
    if not call_arguments(pipeline_class):  # in its place diffusers has a class without a call
        _refuse_missing(model, row)
    more: dict[str, Any] = {"own_defaults": _own_defaults(model, DEFAULTS_FILE, read(DEFAULTS_FILE))}
    if vae.get("_class_name") == "AutoencoderDCV":
        return _deep_compression_facts(model, location, row, vae, transformer, **more)
    if row.guidance == "guider":
        scale = (read("guider/guider_config.json") or {}).get("guidance_scale")
        row, more["guider_scale"] = (row, float(scale)) if scale is not None else (replace(row, guidance=""), None)
    frame_factor, size_factor = row.factors(vae)
    return ModelFacts(
        name=model,
        location=location,
        row=row,
        frame_factor=frame_factor,
        size_factor=size_factor,
        patch=patch_of(transformer),
        max_positions=transformer.get("rope_max_seq_len"),
        transformer=transformer,
        most_steps=_most_steps(read("scheduler/scheduler_config.json") or {}),
        trained_for=_trained_for(location, transformer, read),
        **more,
    )


def _trained_for(location: str, transformer: Mapping[str, Any], read: Reader) -> str:
    """The method of sparse attention that the transformers of a model were trained for; "" for none."""
    from ...pipelines.trained_for import KEY

    if told := transformer.get(KEY):
        return next(iter(told))
    older = next((name for name, file in LEARNED_FILES.items() if read(file) is not None), "")
    return older or ("vsa" if _has_gates(location) else "")


def _has_gates(location: str) -> bool:
    """Whether the files of a model, in a folder or of the hub, have gates, also where nothing says that it has."""
    from ...pipelines.acceleration.vsa_gates import published
    from ...pipelines.files.weight_files import HubError
    from ...pipelines.loras.files import TRANSFORMERS

    try:
        return any(published(location, part) is not None for part in TRANSFORMERS)
    except HubError:
        return False  # which is told where the weights are loaded


def _most_steps(scheduler: Mapping[str, Any]) -> int | None:
    """Steps that a scheduler has times for, from its config; None where any number will do."""
    levels = _LEVELS.get(str(scheduler.get("_class_name")))
    return None if levels is None else len(scheduler[levels[0]]) + levels[1]


def _adapter_facts(model: str, location: str, adapter: dict[str, Any], read: Reader) -> ModelFacts:
    """Of adapter-only weights (see `pipelines.adapted`): the autoencoder is in `vae/`, otherwise the one they name."""
    from ...pipelines.deep_compression.adapter_folder import check_kinds

    try:
        check_kinds(adapter)
    except ValueError as error:
        raise BadInput("model", f"in adapter.json {error}", "Write or download it again.", value=model) from error
    transformer = adapter.get("transformer") or {}
    missing = {"in_channels", "out_channels"} - set(transformer)
    if missing:
        problem = f"adapter.json lacks {', '.join(sorted(missing))} of the transformer"
        raise BadInput("model", problem, "Write or download the adapter again.", value=model)
    autoencoder, vae = None, read("vae/config.json")
    if vae is None:
        autoencoder = _named_autoencoder(model, location, adapter.get("autoencoder"))
        vae = reader(autoencoder, f"of {model}, its autoencoder: ")("config.json")
    if vae is None or vae.get("_class_name") != "AutoencoderDCV":
        kind = "has no config.json" if vae is None else f"has the class {vae.get('_class_name')}"
        problem = (
            f"its autoencoder {autoencoder or 'vae/'} {kind}, but a video model needs a folder of an AutoencoderDCV"
        )
        raise BadInput("model", problem, value=model)
    image = transformer["in_channels"] != transformer["out_channels"]
    pipeline_class = "DCVideoGenImageToVideoPipeline" if image else "DCVideoGenPipeline"
    defaults = _own_defaults(model, "adapter.json", adapter.get("defaults"))
    row = find_row(pipeline_class, transformer)
    more: dict[str, Any] = {"autoencoder": autoencoder, "own_defaults": defaults}
    return _deep_compression_facts(model, location, row, vae, transformer, **more)


def _named_autoencoder(model: str, location: str, named: str | None) -> str:
    """Folder, seen from that of the adapter, or hub id of the autoencoder that adapter.json names."""
    from ...pipelines.files.locations import named_autoencoder

    found = named_autoencoder(location, named)
    if found is None:
        raise BadInput(
            "model",
            f"the autoencoder that adapter.json names, {named or 'none'}, is not there, and vae/ holds none",
            f"Copy the folder of its AutoencoderDCV to {Path(location) / 'vae'}.",
            value=model,
        )
    return found


def _deep_compression_facts(
    model: str, location: str, row: PipelineRow, vae: dict[str, Any], transformer: dict[str, Any], **more: Any
) -> ModelFacts:
    return ModelFacts(
        name=model,
        location=location,
        row=row,
        frame_factor=4,
        size_factor=2 ** (len(vae.get("block_out_channels", ())) - 2),
        patch=tuple(transformer.get("patch_size", (1, 1, 1))),
        max_positions=transformer.get("rope_max_seq_len"),
        transformer=transformer,
        pad_frames=int(vae.get("pad_frames", 0)),
        **more,
    )


def _own_defaults(model: str, file: str, stated: Any) -> dict[str, int | float]:
    """What a model states, checked, and for the built-in models what they are measured with."""
    stated = {} if stated is None else stated
    if not isinstance(stated, dict) or not set(stated) <= set(DEFAULTS):
        problem = f"the defaults in {file} are {stated}: they may have {', '.join(DEFAULTS)}"
        raise BadInput("model", problem, value=model)
    for name, value in stated.items():
        kinds = (int, float) if name == "guidance_scale" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or value < 1:
            kind = "number" if name == "guidance_scale" else "whole number"
            problem = f"in {file} the default {name} is {value!r}: it must be a {kind} from 1"
            raise BadInput("model", problem, value=model)
    if model not in DEMOS:
        return stated
    from ...demo import modeling

    measured = {"frames": 33 if model == DEMOS[0] else 32, "height": 128, "width": 128}
    return {**measured, "steps": modeling.STEPS, "guidance_scale": modeling.GUIDANCE_SCALE, **stated}
