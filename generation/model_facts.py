"""What a model is and makes by default: known from a few kB of JSON, before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput
from .model_files import Reader, folder_reader, reader

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..attention.layout import VideoLayout
    from ..pipelines.deep_compression.canvas import Canvas

DEMOS = ("demo", "demo-dc")
_PUBLISHED = ("transformer_t2v", "transformer_i2v")
DEFAULTS_FILE = "generation_defaults.json"
"""Beside a pipeline's `model_index.json`: frames, height, width, steps, guidance_scale that suit it, or some of them.
Adapter-only weights have the same under "defaults" in `adapter.json`."""
_DEFAULTS = ("frames", "height", "width", "steps", "guidance_scale")


@dataclass(frozen=True)
class ModelFacts:
    """What the JSON files of a saved pipeline say, read without its weights.

    Args:
        name: as the user gave it.
        location: folder or hub id for `from_pretrained`.
        pipeline_class: name of the diffusers pipeline class.
        frame_factor: pixel frames per latent frame; the first latent frame is one pixel frame.
        size_factor: pixels per latent pixel.
        patch: `(frames, height, width)` of the transformer's patches.
        max_positions: longest axis of the token grid that the rotary embedding covers, None when unknown.
        pad_frames: frames that the autoencoder puts before a video, for a DC-VideoGen model; None for others.
            Such a model makes any size and length, on a larger canvas that is cropped.
        autoencoder: folder or hub id of the autoencoder of adapter-only weights that lies elsewhere, else None.
        pictures: first and last pictures that the transformer's image encoder looks at, None where any will do.
        own_defaults: frames, sizes, steps and guidance that the model states, see `DEFAULTS_FILE`.
    """

    name: str
    location: str
    pipeline_class: str
    frame_factor: int
    size_factor: int
    patch: tuple[int, int, int]
    max_positions: int | None
    pad_frames: int | None = None
    autoencoder: str | None = None
    pictures: int | None = None
    own_defaults: Mapping[str, int | float] = field(default_factory=dict, hash=False)

    @property
    def makes_any_size(self) -> bool:
        """Whether sizes that the model cannot make are made larger and cropped."""
        return self.pad_frames is not None

    @property
    def size_multiple(self) -> tuple[int, int]:
        """What height and width must be divisible by."""
        return self.size_factor * self.patch[1], self.size_factor * self.patch[2]

    @property
    def needs_image(self) -> bool:
        """Whether the pipeline starts from a picture."""
        return "ImageToVideo" in self.pipeline_class

    @property
    def takes_last_image(self) -> bool:
        """Whether the video can end with a picture."""
        return self.needs_image and self.pictures != 1

    @property
    def needs_last_image(self) -> bool:
        """Whether the video has to end with a picture."""
        return self.needs_image and self.pictures == 2

    @property
    def needs_video(self) -> bool:
        """Whether the pipeline starts from a video."""
        return "VideoToVideo" in self.pipeline_class

    def canvas(self, frames: int, height: int, width: int) -> Canvas | None:
        """What is generated for a video, where sizes that the model cannot make are made larger; None elsewhere."""
        if self.pad_frames is None:
            return None
        from ..pipelines.deep_compression.canvas import Canvas

        factors = {"spatial": self.size_factor, "temporal": self.frame_factor, "pad_frames": self.pad_frames}
        return Canvas.for_video(frames, height, width, patch=self.patch, **factors)

    def layout(self, frames: int, height: int, width: int) -> VideoLayout:
        """The token grid of a video of `frames` x `height` x `width` pixels."""
        from ..attention.layout import VideoLayout

        canvas = self.canvas(frames, height, width)
        if canvas is not None:
            return VideoLayout(*canvas.tokens(self.patch, self.size_factor))
        latent_frames = (frames - 1) // self.frame_factor + 1
        multiple_h, multiple_w = self.size_multiple
        return VideoLayout(latent_frames // self.patch[0], height // multiple_h, width // multiple_w)

    def call_defaults(self) -> dict[str, Any]:
        """Frames, sizes, steps, guidance: those that the model states, otherwise those of the pipeline's `__call__`."""
        if set(self.own_defaults) == set(_DEFAULTS):
            return dict(self.own_defaults)
        from ..pipelines.loading import call_defaults

        defaults = call_defaults(self.pipeline_class)
        defaults.setdefault("num_frames", 81)  # Wan's, where the class takes as many as its input video has
        names = {"frames": "num_frames", "steps": "num_inference_steps"}
        return {n: defaults[names.get(n, n)] for n in _DEFAULTS} | dict(self.own_defaults)


def inspect_model(model: str, image: bool = False, video: bool = False) -> ModelFacts:
    """Read what a model is, from `model_index.json` or `adapter.json` and the configs of autoencoder and transformer.

    Args:
        model: one of `DEMOS`, a folder that `save_pretrained` of a pipeline wrote or that holds an adapter to another
            autoencoder, or a hub id "owner/name". A folder in the layout in which DC-VideoGen is published is
            converted into the cache of `from_pretrained` first.
        image: of a published folder with two models, take the one for image to video.
        video: run a text-to-video model of Wan as video to video, which takes the same weights.

    Raises:
        BadInput: no such model, a folder that is no pipeline, or a pipeline class that cannot be accelerated.
    """
    location = _locate(model)
    read = reader(location)
    index = read("model_index.json")
    adapter = read("adapter.json") if index is None else None
    if adapter is not None:
        return _adapter_facts(model, location, adapter, read)
    if index is None:
        published_class = _published_class(read, image)
        if published_class is None:
            problem = "it is no diffusers pipeline: it has no model_index.json"
            raise BadInput("model", problem, "Give the folder that holds it.", value=model)
        location = _converted(model, location, published_class)
        read = folder_reader(Path(location))
        index = read("model_index.json") or {}
    pipeline_class = index.get("_class_name")
    pipeline_class = pipeline_class[-1] if isinstance(pipeline_class, list) else pipeline_class
    if video and pipeline_class == "WanPipeline":
        pipeline_class = "WanVideoToVideoPipeline"
    return _facts(model, location, str(pipeline_class), read)


def inspect_pipeline(pipe: DiffusionPipeline) -> ModelFacts:
    """What a loaded pipeline is; see `inspect_model`.

    Raises:
        BadInput: it is of a class that cannot be accelerated.
    """
    from ..pipelines.acceleration.families import unwrap

    location = str(getattr(pipe, "name_or_path", None) or type(pipe).__name__)
    name = next((demo for demo in DEMOS if location == _locate(demo)), location)

    def read(file: str) -> dict[str, Any] | None:
        if file == DEFAULTS_FILE:
            return folder_reader(Path(location))(file)
        part = unwrap(getattr(pipe, file.partition("/")[0], None))
        config = getattr(part, "config", None)
        return None if config is None else {"_class_name": type(part).__name__, **config}

    return _facts(name, location, type(pipe).__name__, read)


def _facts(model: str, location: str, pipeline_class: str, read: Reader) -> ModelFacts:
    """Of a pipeline whose configs can be read."""
    from ..pipelines.acceleration.families import supported_pipelines

    if pipeline_class not in supported_pipelines():
        known = ", ".join(supported_pipelines())
        raise BadInput("model", f"it is a {pipeline_class}, which is not supported; supported: {known}", value=model)
    transformer = next((c for n in ("transformer", "transformer_2") if (c := read(f"{n}/config.json"))), None)
    vae = read("vae/config.json")
    if transformer is None or vae is None:
        problem = "it is incomplete: it needs vae/config.json and transformer/config.json"
        raise BadInput("model", problem, value=model)
    if "VideoToVideo" in pipeline_class and read("transformer_2/config.json"):
        problem = "it has two transformers, with which diffusers has no video to video"
        raise BadInput("video", f"is of no use: {problem}", "Take a model with one, such as Wan 2.1.")
    more: dict[str, Any] = {"own_defaults": _own_defaults(model, DEFAULTS_FILE, read(DEFAULTS_FILE))}
    if transformer.get("image_dim") is not None:
        more["pictures"] = 1 if transformer.get("pos_embed_seq_len") is None else 2
    if vae.get("_class_name") == "AutoencoderDCV":
        return _deep_compression_facts(model, location, pipeline_class, vae, transformer, **more)
    return ModelFacts(
        name=model,
        location=location,
        pipeline_class=pipeline_class,
        # Configs written before diffusers had these two fields belong to Wan 2.1, whose autoencoder is 4x and 8x.
        frame_factor=int(vae.get("scale_factor_temporal", 4)),
        size_factor=int(vae.get("scale_factor_spatial", 8)),
        patch=tuple(transformer.get("patch_size", (1, 2, 2))),
        max_positions=transformer.get("rope_max_seq_len"),
        **more,
    )


def _published_class(read: Reader, image: bool) -> str | None:
    """The pipeline class of a model in a published layout; None for what is in none."""
    there = [name for name in _PUBLISHED if read(f"{name}/config.json") is not None]
    config = read("transformer/config.json")
    if not there and config is not None and config.get("patch_size") == [1, 1, 1]:
        there = [_PUBLISHED[config.get("in_channels") != config.get("out_channels")]]
    if not there:
        return None
    name = _PUBLISHED[image] if len(there) > 1 else there[0]
    return "DCVideoGenPipeline" if name == _PUBLISHED[0] else "DCVideoGenImageToVideoPipeline"


def _converted(model: str, location: str, pipeline_class: str) -> str:
    """The folder of a published model in diffusers' layout, of what is on this machine."""
    from ..pipelines.deep_compression.published import cached_conversion
    from ..pipelines.deep_compression.published_hub import downloaded_folder, known_parts
    from ..pipelines.errors import first_line

    fix = f'Convert it once with "vidaccel convert {model} NEW_FOLDER", and give NEW_FOLDER.'
    folder = Path(location) if Path(location).is_dir() else downloaded_folder(location)
    if folder is None:
        raise BadInput("model", "it is in the layout in which DC-VideoGen is published", fix, value=model)
    try:
        parts: dict[str, Any] = known_parts(location, folder)
        return str(cached_conversion(folder, pipeline_class, **parts, options={"local_files_only": True}))
    except ValueError as error:
        raise BadInput("model", first_line(error).rstrip("."), fix, value=model) from error


def _adapter_facts(model: str, location: str, adapter: dict[str, Any], read: Reader) -> ModelFacts:
    """Of adapter-only weights (see `pipelines.adapted`): the autoencoder is in `vae/`, otherwise the one they name."""
    transformer = adapter.get("transformer", {})
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
    return _deep_compression_facts(
        model, location, pipeline_class, vae, transformer, autoencoder=autoencoder, own_defaults=defaults
    )


def _named_autoencoder(model: str, location: str, named: str | None) -> str:
    """Folder, seen from that of the adapter, or hub id of the autoencoder that adapter.json names."""
    from ..pipelines.locations import named_autoencoder

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
    model: str, location: str, pipeline_class: str, vae: dict[str, Any], transformer: dict[str, Any], **more: Any
) -> ModelFacts:
    return ModelFacts(
        name=model,
        location=location,
        pipeline_class=pipeline_class,
        frame_factor=4,
        size_factor=2 ** (len(vae.get("block_out_channels", ())) - 2),
        patch=tuple(transformer.get("patch_size", (1, 1, 1))),
        max_positions=transformer.get("rope_max_seq_len"),
        pad_frames=int(vae.get("pad_frames", 0)),
        **more,
    )


def _own_defaults(model: str, file: str, stated: Any) -> dict[str, int | float]:
    """What a model states, checked, and for the built-in models what they are measured with."""
    stated = {} if stated is None else stated
    if not isinstance(stated, dict) or not set(stated) <= set(_DEFAULTS):
        problem = f"the defaults in {file} are {stated}: they may have {', '.join(_DEFAULTS)}"
        raise BadInput("model", problem, value=model)
    for name, value in stated.items():
        kinds = (int, float) if name == "guidance_scale" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or value < 1:
            kind = "number" if name == "guidance_scale" else "whole number"
            problem = f"in {file} the default {name} is {value!r}: it must be a {kind} from 1"
            raise BadInput("model", problem, value=model)
    if model not in DEMOS:
        return stated
    from ..demo import modeling

    measured = {"frames": 33 if model == DEMOS[0] else 32, "height": 128, "width": 128}
    return {**measured, "steps": modeling.STEPS, "guidance_scale": modeling.GUIDANCE_SCALE, **stated}


def _locate(model: str) -> str:
    from ..pipelines.locations import is_hub_id

    if model in DEMOS:
        from .. import demo

        try:
            return str(demo.path(model))
        except OSError as error:
            raise BadInput("model", str(error).rstrip("."), value=model) from error
    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser())
    if is_hub_id(model):
        return model
    known = " nor ".join(f'"{name}"' for name in DEMOS)
    problem = f"it is neither {known}, nor a folder here, nor a hub id of the form owner/name"
    raise BadInput("model", problem, value=model)
