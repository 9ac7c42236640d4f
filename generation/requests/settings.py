"""What is asked for, and whether a model can make it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, mention
from .pipeline_options import check_options
from .values import check_readable, check_seed, file_name, number, text, whole_number

if TYPE_CHECKING:
    import numpy as np

    from ...attention.layout import VideoLayout
    from ..models.facts import ModelFacts
    from .inputs import VideoSource

DEFAULT_FPS = 16.0
"""Of a video whose model is not known."""
MIN_FPS, MAX_FPS = 1, 240
INPUTS = ("image", "last_image", "video", "face_video")
"""The fields of what a video starts from."""


@dataclass(frozen=True)
class Settings:
    """What to generate; sizes in pixels. `checked` fills what is None from the model.

    Args:
        prompt, negative_prompt: what the video shows, and what it should not show.
        frames, height, width, steps, guidance_scale: as in diffusers; a guidance scale of 1 is no guidance.
        seed: of the initial noise.
        fps: frames per second of the file; None for those of the file in `video`, and the model's without one.
        image, last_image: the first and the last frame, for image to video; see `inputs.open_picture`.
        video: for video to video; see `inputs.open_video`. Once `checked`, all three have the result's size and length.
        face_video: of the face that moves, for Wan Animate, whose `video` is that of the pose.
        pipeline_options: further arguments of the pipeline's call, by its own names.
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
    face_video: Any = None
    pipeline_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
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
        check_seed("seed", self.seed)
        if self.fps is not None and not MIN_FPS <= self.fps <= MAX_FPS:
            raise BadInput("fps", f"it must be at least {MIN_FPS} and at most {MAX_FPS}", value=self.fps)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise BadInput("strength", "it must be above 0 and at most 1 (1 keeps nothing)", value=self.strength)
        for field in INPUTS:
            file = getattr(self, field)
            if isinstance(file, Path):
                check_readable(field, file)

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
                object.__setattr__(self, field, file_name(field, given))
        options = {} if self.pipeline_options is None else self.pipeline_options
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise BadInput("pipeline_options", "they must be values by name", value=repr(options))
        object.__setattr__(self, "pipeline_options", dict(options))

    @property
    def given(self) -> tuple[str, ...]:
        """The fields of what the video starts from that are given."""
        return tuple(name for name in INPUTS if getattr(self, name) is not None)

    @property
    def extent(self) -> str:
        """Frames and pixels, in words."""
        return f"{self.frames} frames of {self.width}x{self.height}"

    def layout(self, model: ModelFacts) -> VideoLayout:
        """The sequence in self-attention that the video makes; see `ModelFacts.layout`."""
        text = self.pipeline_options.get("max_sequence_length")
        return model.layout(self.frames, self.height, self.width, self.given, text=text)

    def pictures(self, field: str) -> list[Any]:
        """The frames of a video that was read, as PIL has them."""
        from PIL import Image

        return [Image.fromarray(frame) for frame in getattr(self, field)]

    def checked(self, model: ModelFacts) -> Settings:
        """The request with the model's defaults filled in, and its pictures and video read, at the size of the result.

        Raises:
            BadInput: frames or a size that the model cannot make, or a picture or video that is missing, unasked for or
                unreadable.
        """
        from .inputs import fitted_picture, open_video

        self.check_inputs(model)
        check_options(self.pipeline_options, model.row)
        source = None if self.video is None else open_video(self.video)
        whole = self if source is None else self._for_video(source, model)
        if model.row.size_of_picture and self.height is None and self.width is None:
            whole = whole._of_picture(model)
        whole = whole.sized(model)
        _check_negative_prompt(whole, model)
        if source is not None and model.row.strength:
            _check_strength(whole, model)
        # Read once, the largest last: the runs get what is read here.
        read: dict[str, Any] = {}
        notes = list(whole.notes)
        for field in ("image", "last_image"):
            if (given := getattr(whole, field)) is not None:
                read[field], note = fitted_picture(field, given, whole.width, whole.height)
                notes += [note] if note else []
        if source is not None:
            length = _length_to_read(source, whole, model)
            read["video"], more = source.read(length, whole.width, whole.height)
            notes += more
        if self.face_video is not None:
            read["face_video"], more = _face(self.face_video, whole, model)
            notes += more
        return replace(whole, **read, notes=tuple(notes))

    def check_inputs(self, model: ModelFacts) -> None:
        """Pictures and videos are there where the model needs them, and what it has no use for is not given.

        Raises:
            BadInput: otherwise; none of them is read for that.
        """
        kind, row = model.pipeline_class, model.row
        for field in self.given:
            if field not in row.takes:
                what = _WHAT[field]
                raise BadInput(field, f"is of no use: this {kind} takes no {what}", "Leave it out.")
        for fields in row.needs:
            if not any(field in self.given for field in fields):
                what = " or a ".join(_WHAT[field] for field in fields)
                others = "".join(f" (or {mention(field)})" for field in fields[1:])
                raise BadInput(fields[0], f"is missing: this {kind} needs a {what}{others}")
        if row.continues and len({"image", "video"} & set(self.given)) == 2:
            raise BadInput("video", f"is of no use with {mention('image')}: both are the beginning", "Give one.")
        if self.strength is not None and self.video is None:
            raise BadInput("strength", f"is of use only with {mention('video')}", "Leave it out.")
        if self.strength is not None and not row.strength:
            raise BadInput("strength", f"is of no use: this {kind} takes none", "Leave it out.")
        if self.guidance_scale is not None and not row.guidance:
            raise BadInput("guidance_scale", f"is of no use: this {kind} has no guidance", "Leave it out.")
        if self.negative_prompt and not row.negative_prompt:
            raise BadInput("negative_prompt", f"is of no use: this {kind} takes none", "Leave it out.")
        true = row.true_guidance
        scale = self.pipeline_options.get(true)
        if self.negative_prompt and true and not (isinstance(scale, int | float) and scale > 1):
            problem = f"is of no use: the guidance of this {kind} is built into the model"
            fix = f"Leave it out, or give {true} above 1 in {mention('pipeline_options')}, which takes twice the time."
            raise BadInput("negative_prompt", problem, fix)

    def _of_picture(self, model: ModelFacts) -> Settings:
        """The size that follows from the picture, which is then open."""
        from .inputs import open_picture

        if self.image is None:
            return self
        picture = open_picture("image", self.image)
        height, width = model.nearest_size(picture.height, picture.width)
        return replace(self, image=picture, height=height, width=width)

    def _for_video(self, source: VideoSource, model: ModelFacts) -> Settings:
        """As many frames as the input video has and the model makes, and its rate, where none are given.

        Of a video that the result goes on from, only the rate counts.
        """
        whole = self
        if not model.row.continues:
            if self.frames is not None and self.frames > source.frames:
                raise BadInput(
                    "frames",
                    f"the input video has {source.frames}",
                    "Give fewer, or a longer video.",
                    value=self.frames,
                )
            if self.frames is None:
                count, more = model.row.frames.nearest(source.frames, model.frame_factor)
                if count is None:
                    problem = f"has {source.frames} frames, and this model makes {more or 'others'} at the least"
                    raise BadInput("video", problem, "Give a longer one.")
                whole = replace(self, frames=count)
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
        defaults = {**model.call_defaults(), "fps": model.row.fps}
        whole = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        least = model.row.least_steps
        if whole.steps < least:
            problem = f"a {model.pipeline_class} makes {least} at the least"
            raise BadInput("steps", problem, f"Give {least} or more.", value=whole.steps)
        if model.most_steps is not None and whole.steps > model.most_steps:
            problem = f"this model is distilled to {model.most_steps} steps at the most"
            raise BadInput("steps", problem, f"Give {model.most_steps}.", value=whole.steps)
        if not model.makes_any_size:
            _check_size(whole, model)
        layout = whole.layout(model)
        longest = max(layout.frames, layout.height, layout.width)
        if model.max_positions is not None and longest > model.max_positions:
            wanted = whole.extent
            raise BadInput(
                "frames" if longest == layout.frames else "width" if longest == layout.width else "height",
                f"is too large: {wanted} make {longest} tokens along an axis, above the {model.max_positions} "
                "positions of this model",
                "Give a shorter or smaller video.",
            )
        return whole


_WHAT = {
    "image": "picture to start from",
    "last_image": "picture to end with",
    "video": "video to start from",
    "face_video": "video of a face",
}


def _check_negative_prompt(settings: Settings, model: ModelFacts) -> None:
    """Raise BadInput where no guidance would read it.

    Not where an argument of the pipeline's own may guide: that of guidance beside the model's, which was looked at
    before, of sound, or of the second transformer.
    """
    scale = settings.guidance_scale
    others = any("guidance" in name for name in settings.pipeline_options)
    guided = scale is None or scale > 1 or others or model.row.true_guidance
    if settings.negative_prompt and not guided:
        problem = f"is of no use: {mention('guidance_scale')} is {scale:g}, and guidance alone reads it"
        raise BadInput("negative_prompt", problem, f"Leave it out, or give {mention('guidance_scale')} above 1.")


def _check_size(settings: Settings, model: ModelFacts) -> None:
    """Raise BadInput for frames or a size that diffusers would change without asking."""
    frames, factor, rule = settings.frames, model.frame_factor, model.row.frames
    if not rule.makes(frames, factor):
        below, above = rule.nearest(frames, factor)
        made = rule.made(frames, factor)
        rounds = f"; diffusers would round it to {made} without asking" if made != frames else ""
        raise BadInput(
            "frames",
            f"this model makes {rule.told(factor)} frames{rounds}",
            f"Give {' or '.join(str(n) for n in (below, above) if n is not None)}.",
            value=frames,
        )
    if model.row.nearest_size is not None:
        nearest = model.nearest_size(settings.height, settings.width)
        if nearest != (settings.height, settings.width):
            side = "height" if nearest[0] != settings.height else "width"
            problem = f"this model does not make {settings.width}x{settings.height}"
            fix = f"Give {mention('width')} {nearest[1]} and {mention('height')} {nearest[0]}"
            fix += ", or neither: they follow from the picture." if model.row.size_of_picture else "."
            raise BadInput(side, problem, fix, value=getattr(settings, side))
        return
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


def _length_to_read(source: VideoSource, settings: Settings, model: ModelFacts) -> int:
    """Frames of the input video that are used: as many as the result has, or as it can go on from."""
    row = model.row
    if not row.continues:
        return settings.frames
    if source.frames < row.least_video:
        raise BadInput(
            "video", f"has {source.frames} frames: this {row.pipeline} needs {row.least_video} to go on from"
        )
    if row.continues == "before":
        return source.frames  # its last frames count, and the pipeline takes as many as it wants
    frames = min(source.frames, settings.frames)
    return (frames - 1) // model.frame_factor * model.frame_factor + 1


def _face(video: Any, settings: Settings, model: ModelFacts) -> tuple[np.ndarray, tuple[str, ...]]:
    """As many frames of a face as the result has, at the size that the model's eye for faces has; and what was cut."""
    from .inputs import open_video

    source = open_video(video, "face_video")
    if source.frames < settings.frames:
        raise BadInput("face_video", f"has {source.frames} frames, fewer than the {settings.frames} of the result")
    side = model.transformer.get("motion_encoder_size") or 512
    return source.read(settings.frames, side, side)


def _check_strength(settings: Settings, model: ModelFacts) -> None:
    """Raise BadInput where the part of the steps that an input video is put through has none, as diffusers counts."""
    from ...pipelines.loading import call_defaults

    steps, strength = settings.steps, settings.strength
    if strength is None:
        strength = call_defaults(model.pipeline_class).get(model.row.strength, 1.0)
    if int(steps * strength) >= 1:
        return
    digits = max(3, len(str(steps)))
    least = math.ceil(10**digits / steps) / 10**digits
    if int(steps * least) < 1:  # rounded in binary
        least += 10**-digits
    problem = f"with {mention('steps')} {steps} it leaves no step to make"
    raise BadInput("strength", problem, f"Give {least:.{digits}g} or more, or more steps.", value=strength)
