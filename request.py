"""What is asked for, and whether the model can do it: known from a few kB of JSON, before any weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .attention.layout import VideoLayout
    from .attention.methods.base import Method
    from .pipelines.canvas import Canvas

DEMOS = ("demo", "demo-dc")
_PUBLISHED = ("transformer_t2v", "transformer_i2v")
DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**63 - 1


class BadInput(ValueError):
    """A request that cannot be met; the message is one line and says value, bound and fix."""


# -- the model, from its configs ---------------------------------------------------------------------------------------


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
    """

    name: str
    location: str
    pipeline_class: str
    frame_factor: int
    size_factor: int
    patch: tuple[int, int, int]
    max_positions: int | None
    pad_frames: int | None = None

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

    def canvas(self, frames: int, height: int, width: int) -> Canvas | None:
        """What is generated for a video, where sizes that the model cannot make are made larger; None elsewhere."""
        if self.pad_frames is None:
            return None
        from .pipelines.canvas import Canvas

        factors = {"spatial": self.size_factor, "temporal": self.frame_factor, "pad_frames": self.pad_frames}
        return Canvas.for_video(frames, height, width, patch=self.patch, **factors)

    def layout(self, frames: int, height: int, width: int) -> VideoLayout:
        """The token grid of a video of `frames` x `height` x `width` pixels."""
        from .attention.layout import VideoLayout

        canvas = self.canvas(frames, height, width)
        if canvas is not None:
            return VideoLayout(*canvas.tokens(self.patch, self.size_factor))
        latent_frames = (frames - 1) // self.frame_factor + 1
        multiple_h, multiple_w = self.size_multiple
        return VideoLayout(latent_frames // self.patch[0], height // multiple_h, width // multiple_w)


def inspect_model(model: str) -> ModelFacts:
    """Read what a model is, from `model_index.json` and the configs of its autoencoder and transformer.

    Args:
        model: one of `DEMOS`, a folder that `save_pretrained` of a pipeline wrote or that holds an adapter to another
            autoencoder, or a hub id "owner/name".

    Raises:
        BadInput: no such model, a folder that is no pipeline, or a pipeline class that cannot be accelerated.
    """
    from .pipelines.specs import supported_pipelines

    location = _locate(model)
    read = _folder_reader(Path(location)) if Path(location).is_dir() else _hub_reader(location)
    index = read("model_index.json")
    adapter = read("adapter.json") if index is None else None
    if adapter is not None:
        return _adapter_facts(model, location, adapter, read("vae/config.json"))
    if index is None:
        published = next((n for n in _PUBLISHED if read(f"{n}/config.json") is not None), None)
        if published is not None:
            raise BadInput(
                f"--model {model} has no model_index.json, but a {published}, as DC-VideoGen is published: convert it "
                f'once with "vidaccel convert {model} NEW_FOLDER", and give NEW_FOLDER.'
            )
        raise BadInput(
            f"--model {model} is no diffusers pipeline: it has no model_index.json (give the folder that holds it)."
        )
    pipeline_class = index.get("_class_name")
    pipeline_class = pipeline_class[-1] if isinstance(pipeline_class, list) else pipeline_class
    if pipeline_class not in supported_pipelines():
        known = ", ".join(supported_pipelines())
        raise BadInput(f"--model {model} is a {pipeline_class}, which is not supported; supported: {known}.")
    if "VideoToVideo" in pipeline_class:
        raise BadInput(f"--model {model} is a {pipeline_class}: this command has no input video; use it from Python.")
    transformer = next((c for n in ("transformer", "transformer_2") if (c := read(f"{n}/config.json"))), None)
    vae = read("vae/config.json")
    if transformer is None or vae is None:
        raise BadInput(f"--model {model} is incomplete: it needs vae/config.json and transformer/config.json.")
    if vae.get("_class_name") == "AutoencoderDCV":
        return _deep_compression_facts(model, location, pipeline_class, vae, transformer)
    return ModelFacts(
        name=model,
        location=location,
        pipeline_class=pipeline_class,
        # Configs written before diffusers had these two fields belong to Wan 2.1, whose autoencoder is 4x and 8x.
        frame_factor=int(vae.get("scale_factor_temporal", 4)),
        size_factor=int(vae.get("scale_factor_spatial", 8)),
        patch=tuple(transformer.get("patch_size", (1, 2, 2))),
        max_positions=transformer.get("rope_max_seq_len"),
    )


def _adapter_facts(model: str, location: str, adapter: dict[str, Any], vae: dict[str, Any] | None) -> ModelFacts:
    """Of a folder with adapter-only weights (see `pipelines.adapted`)."""
    transformer = adapter.get("transformer", {})
    if vae is None or not {"in_channels", "out_channels"} <= set(transformer):
        raise BadInput(
            f"--model {model} holds an adapter that is incomplete: it needs vae/config.json, and the transformer's "
            "config in adapter.json."
        )
    image = transformer["in_channels"] != transformer["out_channels"]
    pipeline_class = "DCVideoGenImageToVideoPipeline" if image else "DCVideoGenPipeline"
    return _deep_compression_facts(model, location, pipeline_class, vae, transformer)


def _deep_compression_facts(
    model: str, location: str, pipeline_class: str, vae: dict[str, Any], transformer: dict[str, Any]
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
    )


def _locate(model: str) -> str:
    if model in DEMOS:
        from . import demo

        try:
            return str(demo.path(model))
        except OSError as error:
            raise BadInput(f"--model {model}: {error}") from error
    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser())
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        return model
    known = " nor ".join(f'"{name}"' for name in DEMOS)
    raise BadInput(f"--model {model} is neither {known}, nor a folder here, nor a hub id of the form owner/name.")


def _folder_reader(folder: Path) -> Callable[[str], dict[str, Any] | None]:
    def read(name: str) -> dict[str, Any] | None:
        try:
            return json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder / name} cannot be read as JSON: {error}") from error

    return read


def _hub_reader(repository: str) -> Callable[[str], dict[str, Any] | None]:
    import huggingface_hub as hub
    from huggingface_hub import errors

    def read(name: str) -> dict[str, Any] | None:
        try:
            return json.loads(Path(hub.hf_hub_download(repository, name)).read_text(encoding="utf-8"))
        except errors.EntryNotFoundError as error:
            # The offline sibling of this error means "not in the cache", which says nothing about the repository.
            if not isinstance(error, errors.LocalEntryNotFoundError):
                return None
            raise BadInput(
                f"--model {repository}: {name} is not in the local cache and the hub cannot be reached."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise BadInput(
                f"--model {repository}: the hub has no such public model, and no folder here has this name."
            ) from error
        except (OSError, errors.HfHubHTTPError) as error:
            raise BadInput(
                f"--model {repository}: {name} cannot be fetched from the hub ({first_line(error)})."
            ) from error

    return read


# -- the request -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What to generate; sizes in pixels. `checked` fills what is None from the model."""

    prompt: str
    negative_prompt: str = ""
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    fps: float = 16
    image: Path | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise BadInput("the prompt is empty: say what the video shows.")
        for option in ("frames", "height", "width", "steps"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise BadInput(f"--{option} is {value}: it must be at least 1.")
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < float("inf"):
            raise BadInput(
                f"--guidance-scale is {self.guidance_scale}: it must be at least 1 (1 switches guidance off)."
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise BadInput(f"--seed is {self.seed}: it must be between 0 and {MAX_SEED}.")
        if not 0 < self.fps <= 240:
            raise BadInput(f"--fps is {self.fps}: it must be above 0 and at most 240.")
        if self.image is not None and not self.image.is_file():
            raise BadInput(f"--image {self.image}: no such file.")

    def checked(self, model: ModelFacts) -> Settings:
        """The request with the model's defaults filled in.

        Raises:
            BadInput: frames or a size that the model cannot make, or an image missing or unasked for.
        """
        whole = self.sized(model)
        if model.needs_image and whole.image is None:
            raise BadInput(f"{model.pipeline_class} starts from a picture: give --image FILE.")
        if whole.image is not None and not model.needs_image:
            raise BadInput(f"--image: {model.pipeline_class} takes no picture, only a prompt.")
        if whole.image is not None:
            open_image(whole.image)
        return whole

    def sized(self, model: ModelFacts) -> Settings:
        """The request with the model's defaults filled in, of which only frames and sizes are checked.

        Raises:
            BadInput: frames or a size that the model cannot make.
        """
        defaults = _defaults(model)
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        whole = replace(self, **missing)
        factor = model.frame_factor
        if not model.makes_any_size and (whole.frames - 1) % factor:
            rounded = whole.frames // factor * factor + 1
            below = (whole.frames - 1) // factor * factor + 1
            raise BadInput(
                f"--frames is {whole.frames}: this model makes {factor}k+1 frames; diffusers would round "
                f"it to {rounded} without asking. Give {below} or {below + factor}."
            )
        for option, multiple in zip(("height", "width"), model.size_multiple, strict=True):
            value = getattr(whole, option)
            if not model.makes_any_size and value % multiple:
                below = value // multiple * multiple
                nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
                raise BadInput(
                    f"--{option} is {value}: it must be a multiple of {multiple} (autoencoder {model.size_factor}x, "
                    f"patches of {multiple // model.size_factor}). Give {nearest}."
                )
        layout = model.layout(whole.frames, whole.height, whole.width)
        longest = max(layout.frames, layout.height, layout.width)
        if model.max_positions is not None and longest > model.max_positions:
            raise BadInput(
                f"{whole.frames} frames of {whole.width}x{whole.height} make {longest} tokens along an axis, above the "
                f"{model.max_positions} positions of this model. Give a shorter or smaller video."
            )
        return whole


def _defaults(model: ModelFacts) -> dict[str, Any]:
    """Frames, sizes, steps, guidance: those the demo model is measured with, or those of the pipeline's `__call__`."""
    if model.name in DEMOS:
        from .demo import modeling

        return {
            "frames": 32 if model.makes_any_size else 33,
            "height": 128,
            "width": 128,
            "steps": modeling.STEPS,
            "guidance_scale": modeling.GUIDANCE_SCALE,
        }
    from .pipelines.loading import call_defaults

    defaults = call_defaults(model.pipeline_class)
    names = {"frames": "num_frames", "steps": "num_inference_steps"}
    return {n: defaults[names.get(n, n)] for n in ("frames", "height", "width", "steps", "guidance_scale")}


def open_image(path: Path) -> Image.Image:
    """The first frame for an image-to-video model; BadInput when the file is no picture."""
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise BadInput(f"--image {path} is no picture: {first_line(error)}") from error


def build_method(
    name: str,
    layout: VideoLayout,
    *,
    density: float | None = None,
    overrides: dict[str, Any] | None = None,
    dense_steps: int | float | None = None,
    dense_layers: int | float | None = None,
) -> Method:
    """A method with the command line's settings.

    Args:
        name: a key of `attention.METHODS`.
        layout: the token grid, which a method may need to meet a density.
        density: pairs computed over pairs in dense attention, in the sparse steps; None keeps the method's own default.
        overrides: further fields of the method.
        dense_steps, dense_layers: first steps and layers that stay dense (count or fraction); None keeps the default.

    Raises:
        BadInput: a field the method lacks, or a value it refuses.
    """
    from .attention import METHODS

    method_class = METHODS[name]
    known = [f.name for f in fields(method_class) if f.name != "schedule"]
    for field in overrides or {}:
        if field not in known:
            raise BadInput(f"--set {name}.{field}: {name} has no such setting; it has {', '.join(known)}.")
    try:
        method = method_class() if density is None else method_class.for_density(layout, density)
        schedule = method.schedule
        if dense_steps is not None:
            schedule = replace(schedule, first_steps=dense_steps)
        if dense_layers is not None:
            schedule = replace(schedule, first_layers=dense_layers)
        method = replace(method, schedule=schedule, **(overrides or {}))
        method.check(layout)
        return method
    except (ValueError, TypeError) as error:
        raise BadInput(f"--method {name}: {first_line(error)}") from error


def choose_device(name: str, offload: bool) -> torch.device:
    """The device that --device means; BadInput when this machine lacks it."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device {name} is unknown: give auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {name}: torch {torch.__version__} finds no CUDA device here; give --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0.")
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name} is not supported: give auto, cpu, cuda or cuda:N.")
    if offload and device.type != "cuda":
        raise BadInput(f"--offload moves parts between GPU and main memory, and the device is {device}: leave it out.")
    return device


def check_backend(name: str, device: torch.device, sparse: bool) -> None:
    """Raise BadInput when --backend is unknown or cannot run here, sparsely where that is wanted."""
    from .attention.backends import BACKENDS, refusal

    if name != "auto" and name not in BACKENDS:
        raise BadInput(f"--backend {name} is unknown; known: auto, {', '.join(BACKENDS)}.")
    if sparse:
        reason = refusal(name, device)
    else:
        reason = None if name == "auto" else BACKENDS[name].unavailable(device)
    if reason is not None:
        fix = "See" if name == "auto" else "Give --backend auto, or see"
        raise BadInput(f"--backend {name} cannot be used here: it {reason}. {fix} `vidaccel info`.")


def choose_dtype(name: str, device: torch.device, model: str) -> torch.dtype:
    """The dtype that --dtype means; BadInput for one that models are not run in."""
    import torch

    if name != "auto" and name not in DTYPES:
        raise BadInput(f"--dtype is {name}: it must be auto, {', '.join(DTYPES)}.")
    if name == "auto":
        # The demo model was trained and measured in float32, and CPUs are slow in bfloat16.
        name = "bfloat16" if device.type == "cuda" and model not in DEMOS else "float32"
    return getattr(torch, name)


def first_line(error: BaseException) -> str:
    """The first line of a message: some libraries write pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
