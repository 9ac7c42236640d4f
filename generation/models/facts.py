"""What is known of a model before its weights are read: what it makes, and which sequences."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..rows import PipelineRow, Shape

if TYPE_CHECKING:
    from ...attention.layout import VideoLayout
    from ...pipelines.deep_compression.canvas import Canvas


DEFAULTS = ("frames", "height", "width", "steps", "guidance_scale")
"""What a call of a pipeline needs, and a model may state."""


@dataclass(frozen=True)
class ModelFacts:
    """What the JSON files of a saved pipeline say, read without its weights.

    Args:
        name: as the user gave it.
        location: folder or hub id for `from_pretrained`.
        row: of the pipeline class, for this very model.
        frame_factor: pixel frames per latent frame; the first latent frame is one pixel frame.
        size_factor: pixels per latent pixel.
        patch: `(frames, height, width)` of the transformer's patches.
        max_positions: longest axis of the token grid that the rotary embedding covers, None when unknown.
        pad_frames: frames that the autoencoder puts before a video, for a DC-VideoGen model; None for others.
            Such a model makes any size and length, on a larger canvas that is cropped.
        autoencoder: folder or hub id of the autoencoder of adapter-only weights that lies elsewhere, else None.
        own_defaults: frames, sizes, steps and guidance that the model states, see `adapter_folder.DEFAULTS_FILE`.
        transformer: its config.
        guider_scale: the guidance scale of its guider, where it has one.
        most_steps: of a model that is distilled to few, as its scheduler has them.
        trained_for: name of the method of sparse attention that its weights were trained for; "" for none.
    """

    name: str
    location: str
    row: PipelineRow
    frame_factor: int
    size_factor: int
    patch: tuple[int, int, int]
    max_positions: int | None
    pad_frames: int | None = None
    autoencoder: str | None = None
    own_defaults: Mapping[str, int | float] = field(default_factory=dict, hash=False)
    transformer: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    guider_scale: float | None = None
    most_steps: int | None = None
    trained_for: str = ""

    @property
    def pipeline_class(self) -> str:
        """Name of the pipeline class."""
        return self.row.pipeline

    @property
    def makes_any_size(self) -> bool:
        """Whether sizes that the model cannot make are made larger and cropped."""
        return self.pad_frames is not None

    @property
    def size_multiple(self) -> tuple[int, int]:
        """What height and width must be divisible by."""
        return self.size_factor * self.patch[1], self.size_factor * self.patch[2]

    @property
    def only_dense(self) -> str:
        """Why its self-attention cannot be made sparse, in words; "" where it can."""
        from ...pipelines.acceleration.families import supported_pipelines

        known = supported_pipelines()
        if self.pipeline_class in known:
            return ""
        return f"the attention of a {self.pipeline_class} cannot be made sparse; that of these can: {', '.join(known)}"

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """The size that the model makes where it is asked for another, by its own rule where it has one."""
        if self.row.nearest_size is not None:
            return self.row.nearest_size(height, width, self.transformer, self.size_factor)
        multiple_h, multiple_w = self.size_multiple
        return max(1, height // multiple_h) * multiple_h, max(1, width // multiple_w) * multiple_w

    def canvas(self, frames: int, height: int, width: int) -> Canvas | None:
        """What is generated for a video, where sizes that the model cannot make are made larger; None elsewhere."""
        if self.pad_frames is None:
            return None
        from ...pipelines.deep_compression.canvas import Canvas

        factors = {"spatial": self.size_factor, "temporal": self.frame_factor, "pad_frames": self.pad_frames}
        return Canvas.for_video(frames, height, width, patch=self.patch, **factors)

    def layout(
        self, frames: int, height: int, width: int, given: Collection[str] = (), text: int | None = None
    ) -> VideoLayout:
        """The sequence in self-attention of a video of `frames` x `height` x `width` pixels.

        Text that is as long as the prompt (`row.text_varies`) counts with the most that it can have.

        Args:
            frames, height, width: of the video.
            given: what it starts from, of image, last_image and video.
            text: the most tokens that the prompt may have; None for the pipeline's own.
        """
        from ...attention.layout import VideoLayout

        canvas = self.canvas(frames, height, width)
        if canvas is not None:
            return VideoLayout(*canvas.tokens(self.patch, self.size_factor))
        own = self._call_defaults().get("max_sequence_length") or 0
        shape = Shape(
            frames,
            height,
            width,
            self.frame_factor,
            self.size_factor,
            self.patch,
            frozenset(given),
            self.transformer,
            int(own if text is None else text),
        )
        return self.row.sequence(shape)

    def call_defaults(self) -> dict[str, Any]:
        """Frames, sizes, steps, guidance: those that the model states, otherwise those of the pipeline's `__call__`.

        guidance_scale is left out where the pipeline has none.
        """
        if set(self.own_defaults) == set(DEFAULTS):
            return dict(self.own_defaults)
        stated = self._call_defaults()
        names = {"frames": "num_frames", "steps": "num_inference_steps", "guidance_scale": self.row.guidance}
        found = {n: stated.get(names.get(n, n)) for n in DEFAULTS}
        open_ = self.row.defaults(self.transformer, self.size_factor)
        found = {name: open_.get(name) if value is None else value for name, value in found.items()}
        if self.guider_scale is not None:
            found["guidance_scale"] = self.guider_scale
        if self.most_steps is not None:
            found["steps"] = self.most_steps
        if not self.makes_any_size:
            found["frames"] = self.row.frames.default(int(found["frames"]), self.frame_factor)
        return {name: value for name, value in found.items() if value is not None} | dict(self.own_defaults)

    def _call_defaults(self) -> dict[str, Any]:
        from ...pipelines.loading import call_defaults

        return call_defaults(self.pipeline_class)
