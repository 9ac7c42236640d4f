"""What is asked for, and whether a model can make it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput, mention

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from .model_facts import ModelFacts

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """What to generate; sizes in pixels. `checked` fills what is None from the model.

    Args:
        prompt, negative_prompt: what the video shows, and what it should not show.
        frames, height, width, steps, guidance_scale: as in diffusers; a guidance scale of 1 is no guidance.
        seed: of the initial noise.
        fps: frames per second of the file.
        image, last_image: files or PIL pictures, the first and the last frame, for image to video.
        video: a file, or frames `[F, H, W, 3]` of bytes, for video to video.
        strength: how much of the noise is added to `video`, in (0, 1]; None for the pipeline's own.

    Raises:
        BadInput: a value out of its bounds, or a file that is not there.
    """

    prompt: str
    negative_prompt: str = ""
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    fps: float = 16
    image: Path | Image.Image | None = None
    last_image: Path | Image.Image | None = None
    video: Path | np.ndarray | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise BadInput("prompt", "is empty", "Say what the video shows.")
        for field in ("frames", "height", "width", "steps"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise BadInput(field, "it must be at least 1", value=value)
        guidance = self.guidance_scale
        if guidance is not None and not 1 <= guidance < float("inf"):
            raise BadInput("guidance_scale", "it must be at least 1 (1 switches guidance off)", value=guidance)
        if not 0 <= self.seed <= MAX_SEED:
            raise BadInput("seed", f"it must be between 0 and {MAX_SEED}", value=self.seed)
        if not 0 < self.fps <= 240:
            raise BadInput("fps", "it must be above 0 and at most 240", value=self.fps)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise BadInput("strength", "it must be above 0 and at most 1 (1 keeps nothing)", value=self.strength)
        for field in ("image", "last_image", "video"):
            file = getattr(self, field)
            if isinstance(file, Path) and not file.is_file():
                raise BadInput(field, "there is no such file", value=file)

    def checked(self, model: ModelFacts) -> Settings:
        """The request with the model's defaults filled in.

        Raises:
            BadInput: frames or a size that the model cannot make, or a picture or video that is missing, unasked for or
                unreadable.
        """
        self._check_inputs(model)
        # Read once: the runs get what is read here.
        first, last = (open_picture(field, getattr(self, field)) for field in ("image", "last_image"))
        read = replace(self, image=first, last_image=last)
        if self.video is not None:
            read = read._for_video(model)
        return read.sized(model)

    def _check_inputs(self, model: ModelFacts) -> None:
        """Pictures and videos are there where the model needs them, and nowhere else."""
        kind = model.pipeline_class
        inputs = {  # field -> needed, taken, what it is
            "image": (model.needs_image, model.needs_image, "picture to start from"),
            "last_image": (model.needs_last_image, model.takes_last_image, "picture to end with"),
            "video": (model.needs_video, model.needs_video, "video to start from"),
        }
        for field, (needed, taken, what) in inputs.items():
            if needed and getattr(self, field) is None:
                raise BadInput(field, f"is missing: this {kind} needs a {what}")
            if not taken and getattr(self, field) is not None:
                raise BadInput(field, f"is of no use: this {kind} takes no {what}", "Leave it out.")
        if self.strength is not None and self.video is None:
            raise BadInput("strength", f"is of use only with {mention('video')}", "Leave it out.")

    def _for_video(self, model: ModelFacts) -> Settings:
        """As many frames as the input video has and the model makes, where none are given."""
        frames = open_video(self.video)
        count = (len(frames) - 1) // model.frame_factor * model.frame_factor + 1
        if self.frames is not None and self.frames > len(frames):
            raise BadInput(
                "frames", f"the input video has {len(frames)}", "Give fewer, or a longer video.", value=self.frames
            )
        return replace(self, video=frames, frames=count if self.frames is None else self.frames)

    def sized(self, model: ModelFacts) -> Settings:
        """The request with the model's defaults filled in, of which only frames and sizes are checked.

        Raises:
            BadInput: frames or a size that the model cannot make.
        """
        defaults = model.call_defaults()
        whole = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        if not model.makes_any_size:
            _check_size(whole, model)
        layout = model.layout(whole.frames, whole.height, whole.width)
        longest = max(layout.frames, layout.height, layout.width)
        if model.max_positions is not None and longest > model.max_positions:
            wanted = f"{whole.frames} frames of {whole.width}x{whole.height}"
            raise BadInput(
                "frames" if longest == layout.frames else "width" if longest == layout.width else "height",
                f"is too large: {wanted} make {longest} tokens along an axis, above the {model.max_positions} "
                "positions of this model",
                "Give a shorter or smaller video.",
            )
        return whole


def _check_size(settings: Settings, model: ModelFacts) -> None:
    """Raise BadInput for frames or a size that diffusers would change without asking."""
    frames, factor = settings.frames, model.frame_factor
    if (frames - 1) % factor:
        rounded = frames // factor * factor + 1
        below = (frames - 1) // factor * factor + 1
        raise BadInput(
            "frames",
            f"this model makes {factor}k+1 frames; diffusers would round it to {rounded} without asking",
            f"Give {below} or {below + factor}.",
            value=frames,
        )
    for field, multiple in zip(("height", "width"), model.size_multiple, strict=True):
        value = getattr(settings, field)
        if value % multiple:
            below = value // multiple * multiple
            raise BadInput(
                field,
                f"it must be a multiple of {multiple} (autoencoder {model.size_factor}x, patches of "
                f"{multiple // model.size_factor})",
                f"Give {f'{below} or {below + multiple}' if below else multiple}.",
                value=value,
            )


def open_picture(field: str, picture: Path | Image.Image | None) -> Image.Image | None:
    """The first or last frame for an image-to-video model; BadInput when the file is no picture."""
    if not isinstance(picture, Path):
        return picture
    from ..pipelines.errors import first_line
    from .pictures import read_picture

    try:
        return read_picture(picture)
    except (OSError, ValueError) as error:
        raise BadInput(field, f"cannot be used: {first_line(error).rstrip('.')}") from error


def open_video(video: Path | np.ndarray) -> np.ndarray:
    """The frames `[F, H, W, 3]` of bytes for a video-to-video model; BadInput when the file is no video."""
    if not isinstance(video, Path):
        return video
    from ..pipelines.errors import first_line
    from .video_reader import read_video

    try:
        return read_video(video)[0]
    except OSError as error:
        raise BadInput("video", f"cannot be used: {first_line(error).rstrip('.')}") from error


def pipeline_inputs(settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """Pictures and video as the pipeline takes them, in the video's size, and what was cut off for it, in words."""
    from PIL import Image

    from .pictures import fit_picture

    inputs: dict[str, Any] = {}
    notes = []
    for field in ("image", "last_image"):
        picture = open_picture(field, getattr(settings, field))
        if picture is not None:
            inputs[field], note = fit_picture(picture, settings.width, settings.height)
            notes += [f"{field}: {note}"] if note else []
    if settings.video is not None:
        frames = open_video(settings.video)
        if len(frames) > settings.frames:
            notes.append(f"video: of its {len(frames)} frames, the first {settings.frames} are used.")
        whole = (Image.fromarray(frame) for frame in frames[: settings.frames])
        fitted = [fit_picture(frame, settings.width, settings.height) for frame in whole]
        inputs["video"] = [picture for picture, _ in fitted]
        notes += [f"video: {fitted[0][1]}"] if fitted[0][1] else []
        if settings.strength is not None:
            inputs["strength"] = settings.strength
    return inputs, notes
