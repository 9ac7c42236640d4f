"""The nodes that run diffusers pipelines: load one, accelerate it, make a video."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from comfy_api.latest import InputImpl, Types, io

from ..attention import METHODS as SPARSE_METHODS
from ..generation.errors import BadInput
from ..generation.levers.methods import DEFAULT_METHOD
from ..generation.machine import DTYPES
from ..generation.requests.settings import Settings
from ..generation.requests.values import MAX_SEED
from ..generation.run import StepCallback
from .defaults import defaults_of
from .lora_nodes import Loras
from .native.patch import queue_entry
from .pipeline import pipelines, previews
from .pipeline.acceleration import METHODS, Acceleration
from .pipeline.generating import generate
from .pipeline.inputs import Clip, first_frames
from .pipeline.residency import Residency
from .report.wording import plain_messages
from .report_node import Report
from .schema import accepted
from .sparse_nodes import (
    backend_input,
    compensate_input,
    measure_error_input,
    min_tokens_input,
    precision_input,
    share_inputs,
)
from .watched import Fingerprint, fingerprint, read, state_of_pipeline

if TYPE_CHECKING:
    import torch

    from .pipeline.loras import Lora

CATEGORY = "video acceleration/pipelines"

Pipeline = io.Custom("VIDACCEL_PIPELINE")


def _roots() -> list[str]:
    import folder_paths

    return folder_paths.get_folder_paths("diffusers")


class VidaccelLoadPipeline(io.ComfyNode):
    """A diffusers pipeline from a folder, the hub or this package."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelLoadPipeline",
            display_name="Load Video Pipeline",
            category=CATEGORY,
            description="Loads a video pipeline of diffusers: Wan and its kin, HunyuanVideo, CogVideoX, LTX, Cosmos, "
            "Kandinsky, Mochi, Allegro and others; DC-VideoGen. The built-in ones are tiny "
            "models that draw moving shapes, one in Wan's latents and one in DC-AE-V's (demo-dc); they need no "
            "download and run on a CPU.",
            inputs=[
                io.Combo.Input(
                    "pipeline",
                    options=[*pipelines.BUILT_IN, *pipelines.find_pipelines(_roots())],
                    default=next(iter(pipelines.BUILT_IN)),
                    tooltip="A built-in model, or a folder below models/diffusers that holds a model_index.json.",
                ),
                io.String.Input(
                    "hub_id",
                    default="",
                    tooltip="A pipeline of the Hugging Face hub, as owner/name, or the path of a folder; it is taken "
                    "instead of the one above. A pipeline that is not in the hub's cache yet is downloaded: several "
                    "GB.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *DTYPES],
                    default="auto",
                    **accepted(io.Combo.Input, advanced=True),
                    tooltip="Of the weights. auto is bfloat16 on a GPU, float32 on a CPU and for the built-in models. "
                    "Wan's autoencoder stays in float32; DC-AE-V follows bfloat16.",
                ),
                Loras.Input("loras", optional=True, tooltip="From Pipeline LoRA, one or a chain of them."),
            ],
            outputs=[Pipeline.Output(display_name="pipeline", tooltip="For Accelerate Pipeline or Generate Video.")],
            **accepted(io.Schema, search_aliases=["vidaccel", "diffusers", "load wan", "demo"]),
        )

    @classmethod
    def fingerprint_inputs(cls, pipeline: str | None, hub_id: str | None, **others: Any) -> Fingerprint:
        """Load a pipeline anew once its files were changed."""
        state = None
        with contextlib.suppress(BadInput):  # what runs says that it is gone
            state = state_of_pipeline(pipelines.locate(pipeline or "", hub_id or "", _roots()))
        return fingerprint(state, pipeline, hub_id)

    @classmethod
    def execute(cls, pipeline: str, hub_id: str, dtype: str, loras: tuple[Lora, ...] = ()) -> io.NodeOutput:
        with plain_messages():
            location = pipelines.locate(pipeline, hub_id, _roots())
        read(location, state_of_pipeline)
        field = "hub_id" if hub_id.strip() else "pipeline"
        return io.NodeOutput(pipelines.load(location, dtype, _residency(), loras, field=field))


class VidaccelAcceleratePipeline(io.ComfyNode):
    """Sparse attention for a pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        found = {name: defaults_of(SPARSE_METHODS[name]) for name in METHODS}
        own = found.pop(DEFAULT_METHOD)
        others = "; ".join(f"{name} {each.density:g}, {each.start:g}, {each.layers}" for name, each in found.items())
        return io.Schema(
            node_id="VidaccelAcceleratePipeline",
            display_name="Accelerate Pipeline",
            category=CATEGORY,
            description="Sparse attention for a pipeline. tangent and svg2 follow content; svg finds spatial and "
            "temporal heads; sparge compares blocks of neighbours; radial is one fixed pattern for long videos. The "
            "video differs from the dense one of the same seed, the more so the lower the density and the fewer steps "
            "stay dense. The pipeline that comes in stays dense, so that one graph can make both videos.",
            inputs=[
                Pipeline.Input("pipeline", tooltip="From Load Video Pipeline. It is not changed."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=DEFAULT_METHOD,
                    tooltip="tangent: this project's own, nearest to the dense video at every density measured; "
                    "skipped keys enter by their tangent. svg2: clusters of tokens, as published, with compensate for "
                    "low densities. svg: cheap planning, any size. radial: hardly any planning, for long videos. "
                    "sparge: blocks of tokens by their means, cheap planning. vsa: for a pipeline that was trained for "
                    "it (FastWan), 0 at dense_start_percent. The inputs start with what "
                    f"{DEFAULT_METHOD} has of its own in Python; density, dense_start_percent, dense_layers of the "
                    f"others: {others}.",
                ),
                *share_inputs(own),
                io.Int.Input(
                    "dense_layers",
                    default=own.layers,
                    min=0,
                    max=100,
                    tooltip="So many transformer blocks at the input stay dense.",
                ),
                compensate_input(only="svg2 alone: "),
                backend_input(),
                # Optional, so that graphs that were saved without it run, and as they did; and the last, since the page
                # saves the values of inputs by their place.
                min_tokens_input(optional=True),
                measure_error_input(),
                precision_input(),
            ],
            outputs=[Pipeline.Output(display_name="pipeline", tooltip="For Generate Video.")],
            **accepted(
                io.Schema,
                search_aliases=["vidaccel", "sparse attention", "speed up video", "tangent", "svg2", "radial"],
            ),
        )

    @classmethod
    def execute(cls, pipeline: pipelines.VideoPipeline, **settings: Any) -> io.NodeOutput:
        with plain_messages():
            acceleration = Acceleration(**settings)
        return io.NodeOutput(pipeline.accelerated(acceleration))


class VidaccelGenerateVideo(io.ComfyNode):
    """A video from a pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        own = "0 takes the model's own."
        return io.Schema(
            node_id="VidaccelGenerateVideo",
            display_name="Generate Video",
            category=CATEGORY,
            description="Makes a video with a pipeline, dense or accelerated. The same seed starts from the same noise "
            "with every method and on every device.",
            inputs=[
                Pipeline.Input("pipeline", tooltip="From Load Video Pipeline or Accelerate Pipeline."),
                # Choices such as {red|blue} are drawn by the page, as in ComfyUI's own nodes for text.
                io.String.Input(
                    "prompt", multiline=True, dynamic_prompts=True, default="", tooltip="What the video shows."
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What it should not show. Used where guidance is above 1.",
                ),
                *(
                    io.Int.Input(
                        side,
                        default=0,
                        min=0,
                        max=8192,
                        tooltip=f"Pixels: a multiple of 16 for most (32 for LTX), any number for DC-VideoGen. {own}",
                    )
                    for side in ("width", "height")
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=4097,
                    tooltip="4k + 1 for Wan and most others: 33, 81, ...; 8k + 1 for LTX and CogVideoX, 6k + 1 for "
                    f"Mochi; any number for DC-VideoGen. {own}",
                ),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip=f"Denoising steps. {own}"),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip=f"How closely the video follows the prompt; 1 is without guidance and half the work. {own}",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Of the initial noise.",
                ),
                io.Float.Input(
                    "fps",
                    default=0.0,
                    min=0.0,
                    max=240.0,
                    step=1.0,
                    tooltip=f"Frames per second of the VIDEO output, which some models are told. {own}",
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="The first frame, for an image-to-video pipeline; fitted to size."
                ),
                io.Image.Input(
                    "last_image",
                    optional=True,
                    tooltip="The last frame, for an image-to-video pipeline that was made for one.",
                ),
                io.Video.Input(
                    "video",
                    optional=True,
                    tooltip="A video to start from, as of Load Video or Create Video; text-to-video pipelines of Wan "
                    "2.1 take one. Its first frames are used, as many as are made.",
                ),
                io.Float.Input(
                    "strength",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip=f"With video alone: how much of it is replaced by noise; 1 keeps nothing. {own}",
                ),
                io.Video.Input(
                    "face_video", optional=True, tooltip="For Wan Animate, whose video is that of the pose: the face."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames."),
                io.Video.Output(display_name="video", tooltip="For ComfyUI's Save Video."),
                Report.Output(display_name="report", tooltip="For Sparse Attention Report."),
                io.Audio.Output(
                    display_name="audio", tooltip="The sound, of models that make one; it is in the video as well."
                ),
            ],
            **accepted(io.Schema, search_aliases=["vidaccel", "text to video", "sample video", "diffusers"]),
        )

    @classmethod
    def execute(
        cls,
        pipeline: pipelines.VideoPipeline,
        guidance: float,
        image: torch.Tensor | None = None,
        last_image: torch.Tensor | None = None,
        video: Any = None,
        strength: float = 0.0,
        face_video: Any = None,
        **given: Any,
    ) -> io.NodeOutput:
        with plain_messages():
            own = ("width", "height", "frames", "steps", "fps")  # 0: the model's own
            sizes = {name: given.pop(name) or None for name in own}
            settings = Settings(**given, **sizes, guidance_scale=guidance or None, strength=strength or None)
        made = generate(
            pipeline,
            settings,
            image=image,
            last_image=last_image,
            video=_clip(video),
            face_video=_clip(face_video),
            on_step=_progress(pipeline),
        )
        rate = Fraction(made.fps).limit_denominator(1001)
        film = InputImpl.VideoFromComponents(
            Types.VideoComponents(images=made.frames, audio=made.audio, frame_rate=rate)
        )
        return io.NodeOutput(made.frames, film, replace(made.report, queued=queue_entry()), made.audio)


def _clip(video: Any) -> Clip | None:
    if video is None:
        return None
    return functools.partial(first_frames, video, isinstance(video, InputImpl.VideoFromFile))


def _residency() -> Residency:
    """Weights move as ComfyUI's own models do: it makes room for the part at work and takes back what others need."""
    import torch
    from comfy import model_management
    from comfy.model_patcher import ModelPatcher

    class Part(torch.nn.Module):
        """What ComfyUI moves. It sets `device` and others, which a model of diffusers does not let itself be set."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    device = model_management.get_torch_device()
    patchers: dict[int, ModelPatcher] = {}

    def load(module: torch.nn.Module, working_memory: int) -> None:
        patcher = patchers.get(id(module))
        if patcher is None:
            offload = model_management.unet_offload_device()
            patcher = patchers[id(module)] = ModelPatcher(Part(module), load_device=device, offload_device=offload)
        # Whole: these modules cannot run with a part of their weights elsewhere.
        model_management.load_models_gpu([patcher], memory_required=working_memory, force_full_load=True)
        if patcher.loaded_size() < patcher.model_size():  # ComfyUI's --novram leaves weights behind nevertheless
            patcher.partially_load(device, 1e32)

    capacity = None if device.type == "cpu" else model_management.get_total_memory(device)
    return Residency(device, load, model_management.throw_exception_if_processing_interrupted, capacity)


def _progress(pipeline: pipelines.VideoPipeline) -> StepCallback:
    """ComfyUI's progress bar, with a preview where the user has switched them on; stops where the user asks to."""
    import comfy.model_management
    import comfy.utils

    bars: list[Any] = []
    preview = _preview(pipeline)

    def on_step(step: int, steps: int, latents: torch.Tensor) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not bars:
            bars.append(comfy.utils.ProgressBar(steps))
        bars[0].update_absolute(step, steps, preview(latents))

    return on_step


Picture = tuple[str, Any, int]


def _preview(pipeline: pipelines.VideoPipeline) -> Callable[[torch.Tensor], Picture | None]:
    """Latents -> a picture of the middle frame, as ComfyUI's progress bar takes it."""
    import latent_preview
    from comfy import latent_formats
    from comfy.cli_args import LatentPreviewMethod, args
    from PIL import Image

    pipe = pipeline.pipe
    if args.preview_method == LatentPreviewMethod.NoPreviews or not previews.has_known_latents(pipe):
        return lambda latents: None

    def decoded(latents: torch.Tensor) -> Picture:
        pixels = (previews.decode_frame(pipe, previews.preview_latent(pipe, latents)) * 255).byte().cpu().numpy()
        return "JPEG", Image.fromarray(pixels), latent_preview.MAX_PREVIEW_RESOLUTION

    @functools.cache
    def previewer(channels: int, device: torch.device) -> Any:
        known = {16: latent_formats.Wan21, 48: latent_formats.Wan22}.get(channels)
        return known and latent_preview.get_previewer(device, known())

    def by_comfyui(latents: torch.Tensor) -> Picture | None:
        latent = previews.preview_latent(pipe, latents)
        found = previewer(latent.shape[1], latent.device)
        if found is None:
            return None
        picture = found.decode_latent_to_preview_image("JPEG", latent)
        if not isinstance(found, latent_preview.Latent2RGBPreviewer):
            pipeline.residency.invalidate()  # a small autoencoder may have pushed a part of the transformer out
        return picture

    return decoded if previews.decodes_quickly(pipe) else by_comfyui


NODES: list[type[io.ComfyNode]] = [VidaccelLoadPipeline, VidaccelAcceleratePipeline, VidaccelGenerateVideo]
