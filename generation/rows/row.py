"""What a row says of a pipeline class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...pipelines import head_counts
from .frames import ROUNDED, FrameRule
from .sequence import Shape, video_alone

if TYPE_CHECKING:
    from ...attention.layout import VideoLayout

Config = Mapping[str, Any]
Needs = tuple[tuple[str, ...], ...]


def patch_of(transformer: Config) -> tuple[int, int, int]:
    """`(frames, height, width)` of the patches of a transformer."""
    size = transformer.get("patch_size") or transformer.get("latent_patch_size") or 2
    if isinstance(size, int):
        return int(transformer.get("patch_size_t") or 1), size, size
    return tuple(size)


def wan_factors(vae: Config) -> tuple[int, int]:
    """Configs written before diffusers had these two fields belong to Wan 2.1, whose autoencoder is 4x and 8x."""
    return int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))


def downsampling_factors(vae: Config) -> tuple[int, int]:
    """Pipelines that count the steps of Wan's autoencoder instead of asking it."""
    steps = vae.get("temperal_downsample", (False, True, True))
    return 2 ** sum(map(bool, steps)), 2 ** len(steps)


def stated_factors(vae: Config) -> tuple[int, int]:
    """Of autoencoders whose config states both."""
    return int(vae.get("temporal_compression_ratio", 4)), int(vae.get("spatial_compression_ratio", 8))


@dataclass(frozen=True)
class PipelineRow:
    """One pipeline class of diffusers or of this package: how it is called, and what it makes.

    What its `__call__` and the configs of its parts say is not repeated here.

    Args:
        pipeline: name of the class.
        frames: the numbers of frames that it makes.
        fps: frames per second of the model's videos.
        factors: config of the autoencoder -> pixel frames of a latent frame, pixels of a latent pixel.
        defaults: `(config of the transformer, pixels of a latent pixel)` -> frames, height, width, steps or
            guidance_scale that `__call__` leaves open.
        nearest_size: `(height, width, config of the transformer, pixels of a latent pixel)` -> the size it makes
            instead; None where every multiple of a patch will do.
        size_of_picture: whether the size follows from the picture that it starts from.
        takes: field of the request (image, last_image, video, face_video) -> argument.
        needs: fields of which one has to be given, each time.
        inputs: request, checked -> arguments for what is given, where it is not simply passed on as `takes` says.
        continues: "inside" where `video` is the beginning of the result, "before" where the result goes on after it, ""
            where it is as long as the result.
        least_video: frames that such a video has at the least.
        repeats_video: whether the pipeline puts the video before its result.
        strength: the argument for how much of `video` is replaced by noise.
        guidance: the argument of the guidance scale; "guider" for pipelines that have a guider; "" for none.
        negative_prompt: whether there is one.
        no_negative_prompt: what is passed where none is given; None for the pipeline's own.
        true_guidance: where guidance is built into the model, the argument without which no negative prompt counts.
        rate: the argument of the frames per second.
        steps: steps asked for -> the argument that says so.
        least_steps: that its schedule has.
        always: `(pipeline, request)` -> further arguments of every call.
        sequence: the sequence in self-attention.
        text_varies: whether only so much text is in the sequence as the prompt has; its length is then the most.
        result: the attribute of the result that holds the video.
        single: whether that is one video, not a list of them.
        audio: `(pipeline, result)` -> samples `[channels, samples]` and samples per second; None where it has no sound.
        parts: `(frames, frames of a latent frame)` -> how many times it goes through all steps.
        windows: arguments that change how much is made at once; `sequence` and `parts` count with their defaults.
        follows: whether the autoencoder has to have the dtype of the transformer.
        tiled: whether the autoencoder can decode in tiles alone.
        device_noise: whether it draws noise on the device of the weights alone.
        heads: config of the transformer -> heads of self-attention, and their size.
        no_options: argument that would change nothing that is written -> why; see `pipeline_options`.
        packages: module -> package, of those that it needs beside this package's own.
        variants: field -> the class that takes the same weights where that field is given.
        by_config: `(row, config of the transformer, index of the pipeline)` -> the row for this very model.
    """

    pipeline: str
    frames: FrameRule = ROUNDED
    fps: float = 16.0
    factors: Callable[[Config], tuple[int, int]] = wan_factors
    defaults: Callable[[Config, int], Mapping[str, int | float]] = lambda transformer, size_factor: {}
    nearest_size: Callable[[int, int, Config, int], tuple[int, int]] | None = None
    size_of_picture: bool = False
    takes: Mapping[str, str] = field(default_factory=dict, hash=False)
    needs: Needs = ()
    inputs: Callable[[Any], dict[str, Any]] | None = None
    continues: str = ""
    least_video: int = 1
    repeats_video: bool = False
    strength: str = ""
    guidance: str = "guidance_scale"
    negative_prompt: bool = True
    no_negative_prompt: str | None = ""
    true_guidance: str = ""
    rate: str = ""
    steps: Callable[[int], dict[str, Any]] = lambda steps: {"num_inference_steps": steps}
    least_steps: int = 1
    always: Callable[[Any, Any], dict[str, Any]] = lambda pipe, settings: {}
    sequence: Callable[[Shape], VideoLayout] = video_alone
    text_varies: bool = False
    result: str = "frames"
    single: bool = False
    audio: Callable[[Any, Any], tuple[Any, int] | None] | None = None
    parts: Callable[[int, int], int] = lambda frames, factor: 1
    windows: tuple[str, ...] = ()
    follows: bool = True
    tiled: bool = False
    device_noise: bool = False
    heads: Callable[[Config], tuple[int, int]] = head_counts.usual
    no_options: Mapping[str, str] = field(default_factory=dict, hash=False)
    packages: Mapping[str, str] = field(default_factory=dict, hash=False)
    variants: Mapping[str, str] = field(default_factory=dict, hash=False)
    by_config: Callable[[PipelineRow, Config, Config], PipelineRow] = lambda row, transformer, index: row
