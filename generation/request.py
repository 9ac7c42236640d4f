"""What is asked for, and whether a model can make it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput, mention
from .values import number, text, whole_number

if TYPE_CHECKING:
    from .inputs import VideoSource
    from .model_facts import ModelFacts

MAX_SEED = 2**63 - 1
DEFAULT_FPS = 16.0
"""Of a video that starts from no other."""
MIN_FPS, MAX_FPS = 1, 240
INPUTS = ("image", "last_image", "video")
"""The fields of what a video starts from."""


@dataclass(frozen=True)
class Settings:
    """What to generate; sizes in pixels. `checked` fills what is None from the model.

    Args:
        prompt, negative_prompt: what the video shows, and what it should not show.
        frames, height, width, steps, guidance_scale: as in diffusers; a guidance scale of 1 is no guidance.
        seed: of the initial noise.
        fps: frames per second of the file; None for those of the file in `video`, and 16 without one.
        image, last_image: the first and the last frame, for image to video; see `inputs.open_picture`.
        video: for video to video; see `inputs.open_video`. Once `checked`, all three have the result's size and length.
        strength: how much of the noise is added to `video`, in (0, 1]; None for the pipeline's own.
        notes: what was done to the pictures or the video, in words; `checked` writes them.

    Raises:
        BadInput: a value of another kind or out of its bounds, or a file that is not there.
    """

    prompt: str
    negative_prompt: str = ""
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    fps: float | None = None
    image: Any = None
    last_image: Any = None
    video: Any = None
    strength: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._take_harmless_kinds()
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
        if self.fps is not None and not MIN_FPS <= self.fps <= MAX_FPS:
            raise BadInput("fps", f"it must be at least {MIN_FPS} and at most {MAX_FPS}", value=self.fps)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise BadInput("strength", "it must be above 0 and at most 1 (1 keeps nothing)", value=self.strength)
        for field in INPUTS:
            file = getattr(self, field)
            if isinstance(file, Path) and not file.is_file():
                raise BadInput(field, "there is no such file", value=file)

    def _take_harmless_kinds(self) -> None:
        """Values of the kinds that the fields have; raise BadInput for those that cannot be meant."""
        kinds: dict[str, Callable[[str, Any], Any]] = {
            **dict.fromkeys(("prompt", "negative_prompt"), text),
            **dict.fromkeys(("frames", "height", "width", "steps", "seed"), whole_number),
            **dict.fromkeys(("guidance_scale", "fps", "strength"), number),
        }
        for field, of_kind in kinds.items():
            value = getattr(self, field)
            if value is None and field == "negative_prompt":
                value = ""
            if value is not None or field in ("prompt", "seed"):
                object.__setattr__(self, field, of_kind(field, value))
        for field in INPUTS:
            if isinstance(given := getattr(self, field), str | os.PathLike):
                object.__setattr__(self, field, Path(given))

    def checked(self, model: ModelFacts) -> Settings:
        """The request with the model's defaults filled in, and its pictures and video read, at the size of the result.

        Raises:
            BadInput: frames or a size that the model cannot make, or a picture or video that is missing, unasked for or
                unreadable.
        """
        from .inputs import fitted_picture, open_video

        self._check_inputs(model)
        source = None if self.video is None else open_video(self.video)
        whole = (self if source is None else self._for_video(source, model)).sized(model)
        if source is not None:
            _check_strength(whole, model)
        # Read once, the largest last: the runs get what is read here.
        read: dict[str, Any] = {}
        notes = list(whole.notes)
        for field in ("image", "last_image"):
            if (given := getattr(whole, field)) is not None:
                read[field], note = fitted_picture(field, given, whole.width, whole.height)
                notes += [note] if note else []
        if source is not None:
            read["video"], more = source.read(whole.frames, whole.width, whole.height)
            notes += more
        return replace(whole, **read, notes=tuple(notes))

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

    def _for_video(self, source: VideoSource, model: ModelFacts) -> Settings:
        """As many frames as the input video has and the model makes, and its rate, where none are given."""
        if self.frames is not None and self.frames > source.frames:
            raise BadInput(
                "frames", f"the input video has {source.frames}", "Give fewer, or a longer video.", value=self.frames
            )
        count = (source.frames - 1) // model.frame_factor * model.frame_factor + 1
        whole = replace(self, frames=count if self.frames is None else self.frames)
        if self.fps is not None or source.fps is None:
            return whole
        rate = float(source.fps)
        if not MIN_FPS <= rate <= MAX_FPS:
            problem = f"is missing: the input video has {rate:g} frames per second, which cannot be written"
            raise BadInput("fps", problem, f"Give {MIN_FPS} to {MAX_FPS}.")
        note = f"video: the result has its {rate:g} frames per second."
        return replace(whole, fps=rate, notes=(*whole.notes, note))

    def sized(self, model: ModelFacts) -> Settings:
        """The request with the model's defaults filled in, of which only frames and sizes are checked.

        Raises:
            BadInput: frames or a size that the model cannot make.
        """
        defaults = {**model.call_defaults(), "fps": DEFAULT_FPS}
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


def _check_strength(settings: Settings, model: ModelFacts) -> None:
    """Raise BadInput where the part of the steps that an input video is put through has none, as diffusers counts."""
    from ..pipelines.loading import call_defaults

    steps, strength = settings.steps, settings.strength
    if strength is None:
        strength = call_defaults(model.pipeline_class).get("strength", 1.0)
    if int(steps * strength) >= 1:
        return
    digits = max(3, len(str(steps)))
    least = math.ceil(10**digits / steps) / 10**digits
    if int(steps * least) < 1:  # rounded in binary
        least += 10**-digits
    problem = f"with {mention('steps')} {steps} it leaves no step to make"
    raise BadInput("strength", problem, f"Give {least:.{digits}g} or more, or more steps.", value=strength)
