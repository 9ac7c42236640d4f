"""What ComfyUI is told that sparse attention needs while a native model samples, so that it keeps that much free.

Before a sampling, ComfyUI estimates what a forward pass takes and gives the weights the rest of the device. It asks
ControlNets alone what they need beside that (`inference_memory_requirements`). A PREPARE_SAMPLING wrapper shows it one
that controls nothing and needs what the method does; the conditions that are sampled with do not have it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...attention import VideoLayout
from .geometry import unwrap
from .limits import too_short
from .models import find_geometry

if TYPE_CHECKING:
    from .override import NativeAttention

KEY = "vidaccel_announced_memory"
STILL = ("standard_static", "batched")  # schedules of context windows that are the same in every step
NOT_TOLD = "its memory was not announced to ComfyUI"
NO_WAY = f"{NOT_TOLD}, which has no way to be told: where it runs out of memory, start it with --reserve-vram."


@dataclass(frozen=True)
class Room:
    """Memory of a method in one sampling.

    Args:
        size: bytes.
        layers: that are sparse.
        conditions: each of which has a forward pass in every step.
        windows: context windows, each of which has these.
        layout: of the video, or of a window.
    """

    size: int
    layers: int
    conditions: int
    windows: int
    layout: VideoLayout

    def __str__(self) -> str:
        many = [f"{self.layers} sparse layer", f"{self.conditions} condition", f"{self.windows} context window"]
        told = [what if what.startswith("1 ") else f"{what}s" for what in many[: 2 + (self.windows > 1)]]
        size = f"{self.size / 2**30:.1f} GiB" if self.size >= 2**30 else f"{self.size / 2**20:.1f} MiB"
        return f"{size}, for {', '.join(told)} and {self.layout.tokens} tokens"


def announce(clone: Any, session: NativeAttention) -> None:
    """Have ComfyUI make room for sparse attention before each sampling of a MODEL.

    Args:
        clone: the MODEL with sparse attention; gets wrappers.
        session: of it; its report says how much was announced, or why nothing was.
    """
    from comfy.patcher_extension import WrappersMP

    prepare, sample = (getattr(WrappersMP, name, None) for name in ("PREPARE_SAMPLING", "OUTER_SAMPLE"))
    control = _control_class()
    if prepare is None or sample is None or control is None:
        session.tell(NO_WAY, logging.WARNING)
        return
    latents: list[Sequence[int]] = []  # shapes of those that the sampler at work has, the video's first

    def outer(executor, *args, **kwargs):
        latents[:] = kwargs.get("latent_shapes") or ()
        try:
            return executor(*args, **kwargs)
        finally:
            latents.clear()

    def wrapper(executor, model, noise_shape, conds, *args, **kwargs):
        # Of the noise, video and audio may be one row, and a wrapper before may have cut it to a context window.
        shape = latents[0] if latents else noise_shape
        try:
            room = _needed(session, model, shape, passes(conds))
        except (AttributeError, TypeError, ValueError) as error:  # a variant of a model that is built otherwise
            session.tell(f"{NOT_TOLD}: it cannot be computed ({error}).", logging.WARNING)
            room = None
        if room is None or room.size == 0:
            return executor(model, noise_shape, conds, *args, **kwargs)
        session.tell(f"announced to ComfyUI, beside what it reckons with itself: {room}.")
        asked = {**conds, KEY: [{"control": control(room.size)}]}
        inner_model, _, models = executor(model, noise_shape, asked, *args, **kwargs)
        return inner_model, conds, models

    clone.add_wrapper_with_key(sample, KEY, outer)
    clone.add_wrapper_with_key(prepare, KEY, wrapper)


def passes(conds: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """How many conditions a step has a forward pass of, at the most.

    Of one with an area, ComfyUI makes another for each other side, unless that has one of the same area.

    Args:
        conds: "positive", "negative" and others that a guider has -> conditions, as a sampler is given them.
    """
    areas = {side: {_area(entry) for entry in entries} - {None} for side, entries in conds.items()}
    added = (len(of - there) for side, of in areas.items() for other, there in areas.items() if other != side)
    return sum(map(len, conds.values())) + sum(added)


def _area(entry: Mapping[str, Any]) -> Any:
    """What tells the area of a condition from others; None for all of the video."""
    if "mask" in entry and entry.get("set_area_to_bounds"):
        return id(entry["mask"])
    area = entry.get("area")
    return None if area is None else tuple(area)


def _needed(session: NativeAttention, model: Any, latent: Sequence[int], conditions: int) -> Room | None:
    """What sparse attention takes in a sampling, None where nothing will be sparse.

    Args:
        session: of the MODEL. model: ComfyUI's ModelPatcher. latent: shape `[B, C, T, H, W]` of the video's latent.
        conditions: of all sides together, see `passes`. All count, also where a guidance of 1 leaves some out: who
            samples does not say so before.
    """
    diffusion_model = unwrap(model.model.diffusion_model)
    geometry = find_geometry(diffusion_model)
    if geometry is None or len(latent) != 5:
        return None  # the first forward pass says why it stays dense
    shape, windows = _window(model.model_options, latent)
    layout = geometry.video(diffusion_model, shape)
    heads, head_dim = geometry.heads(diffusion_model)
    dtype = model.model.get_dtype_inference()
    least = session.least
    least.forget()  # this comes before the sampler starts
    tokens = least.of(heads, head_dim, model.load_device, dtype)[0] if least.needs_heads else least.min_tokens
    if too_short(tokens, layout):
        return None
    layers = geometry.layers(diffusion_model) - len(session.dense.layers)
    try:
        method = session.method_on(layout)
    except ValueError:
        # No error yet: text, references and guides, which are not known here, change the bound that it would name, or
        # keep the pass dense. The first pass says what cannot be done.
        return None
    size = method.run_bytes(layout, heads * latent[0], head_dim, dtype.itemsize, layers * conditions * windows)
    if session.gates is not None:  # what the gate of the layer at work makes of its input
        size += layout.tokens * latent[0] * heads * head_dim * dtype.itemsize
    return Room(size if layers else 0, layers, conditions, windows, layout)


def _window(options: Mapping[str, Any], latent: Sequence[int]) -> tuple[list[int], int]:
    """The latent of one forward pass, and how many such windows have something kept at a time.

    Where windows move from step to step, those of the step before are kept until the step ends.
    """
    handler, shape = options.get("context_handler"), list(latent)
    if handler is None or handler.dim >= len(shape) or shape[handler.dim] <= handler.context_length:
        return shape, 1
    frames = shape[handler.dim]
    anchored = int(getattr(handler, "causal_window_fix", False))  # a frame more in all windows but the first
    shape[handler.dim] = min(frames, handler.context_length + anchored)
    schedule = getattr(getattr(handler, "context_schedule", None), "name", "")
    if schedule in STILL:
        return shape, 1 + math.ceil(
            (frames - handler.context_length) / max(1, handler.context_length - handler.context_overlap)
        )
    # Those of each stride (1, 2, 4 and so on), which may begin anywhere.
    counts = (
        math.ceil(frames / max(1, handler.context_length * 2**n - handler.context_overlap))
        for n in range(max(1, handler.context_stride))
    )
    return shape, 2 * sum(counts)


def _control_class() -> type | None:
    """A ControlNet that does nothing but need memory; None where ComfyUI does not ask for that."""
    from comfy.controlnet import ControlBase

    if not hasattr(ControlBase, "inference_memory_requirements"):
        return None

    class Needs(ControlBase):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.size = size

        def inference_memory_requirements(self, dtype: Any) -> int:
            return self.size

        def deepclone_multigpu(self, load_device: Any, autoregister: bool = False) -> Any:
            return self  # the estimate counts for each device already

    return Needs
