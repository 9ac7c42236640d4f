"""What is asked for, and whether the model and this machine can do it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput, first_line
from .model_facts import DEMOS, ModelFacts, inspect_model

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..attention.layout import VideoLayout
    from ..attention.methods.base import Method

DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**63 - 1
MIN_SPARSE_TOKENS = 8192
"""Videos with fewer tokens stay dense unless a method is asked for: planning would cost more than it saves."""

__all__ = [
    "DEMOS",
    "DTYPES",
    "MAX_SEED",
    "MIN_SPARSE_TOKENS",
    "BadInput",
    "ModelFacts",
    "Settings",
    "build_method",
    "check_backend",
    "choose_device",
    "choose_dtype",
    "first_line",
    "inspect_model",
    "open_image",
]


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
        defaults = model.call_defaults()
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
    from ..attention import METHODS

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
    from ..attention.backends import BACKENDS, refusal

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
