"""Where the weights of a diffusers pipeline are while ComfyUI runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...generation.errors import BadInput, mention
from ...generation.forecast import transformer_bytes

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ...attention import Method, VideoLayout
    from ...generation.requests.settings import Settings


class Residency:
    """Has each part of a pipeline brought to the device when it begins to work.

    Only one part needs to be there at a time; whether the others leave is for `load` to decide.

    Args:
        device: where the parts work.
        load: `(part, working memory in bytes)`: called when another part than the last one begins.
        check: called before every use of a part; raises where the user has stopped the run.
        capacity: bytes that the device has; None where that is no bound.
    """

    def __init__(
        self,
        device: torch.device,
        load: Callable[[torch.nn.Module, int], None],
        check: Callable[[], None] = lambda: None,
        capacity: int | None = None,
    ) -> None:
        self.device, self.capacity, self._load, self._check = device, capacity, load, check
        self._at_work: torch.nn.Module | None = None
        self._needs: dict[str, int] = {}

    def attach(self, pipe: DiffusionPipeline) -> None:
        """Hook into the parts of a pipeline, the way its own offloading does, so that all its code finds the device."""
        import torch
        from accelerate.hooks import ModelHook, add_hook_to_module

        residency = self

        class BringIn(ModelHook):
            def __init__(self, name: str) -> None:
                self.name, self.execution_device = name, residency.device

            def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
                residency._enter(self.name, module)
                return args, kwargs

        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module):
                add_hook_to_module(part, BringIn(name))

    def begin(
        self, pipe: DiffusionPipeline, layout: VideoLayout, settings: Settings, method: Method | None = None
    ) -> None:
        """A run begins: something else may have taken the device in the meantime.

        Args:
            pipe, layout, settings, method: see `working_memory`.

        Raises:
            BadInput: the weights of a part are more than the device holds.
        """
        self.invalidate()
        self._needs = working_memory(pipe, layout, settings, method)
        if self.capacity is None:
            return
        for name, size in part_bytes(pipe).items():
            if size > self.capacity:
                raise BadInput(
                    "model",
                    f"does not fit: its {name} takes {size / 2**30:.1f} GiB, and {self.device} has "
                    f"{self.capacity / 2**30:.1f}, and a part of a diffusers pipeline must fit whole",
                    f"Choose {mention('dtype')} bfloat16 or a smaller model, or load it as one of ComfyUI's own "
                    "models, which can stay in main memory in part, with a Sparse Attention node.",
                )

    def invalidate(self) -> None:
        """Something else used the device: what is at work is asked for anew, and may have to come back."""
        self._at_work = None

    def _enter(self, name: str, part: torch.nn.Module) -> None:
        self._check()
        if part is not self._at_work:
            self._load(part, self._needs.get(name, 0))
            self._at_work = part


def part_bytes(pipe: DiffusionPipeline) -> dict[str, int]:
    """What the weights of each part take."""
    import torch

    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        name: sum(x.numel() * x.element_size() for x in (*part.parameters(), *part.buffers()))
        for name, part in parts.items()
    }


def working_memory(
    pipe: DiffusionPipeline, layout: VideoLayout, settings: Settings, method: Method | None = None
) -> dict[str, int]:
    """A rough estimate of what each part needs beside its weights, in bytes, for ComfyUI to make room.

    Args:
        pipe: with its guidance branches one after the other, as Wan's.
        layout, settings: of the video.
        method: of self-attention; None for dense.
    """
    from ...generation.calls import parts_of, row_of
    from ...generation.forecast import memory_to_decode
    from ...generation.rows import patch_of

    row = row_of(pipe)
    needs, (height, width) = {}, (settings.height, settings.width)
    for name in ("transformer", "transformer_2"):
        part = getattr(pipe, name, None)
        if part is not None:
            heads, head_dim = row.heads(part.config)
            needs[name] = transformer_bytes(layout.tokens, heads * head_dim, part.dtype.itemsize)
            if method is not None:
                calls = _calls_of_a_step(pipe, name, settings)
                needs[name] += method.run_bytes(layout, heads, head_dim, part.dtype.itemsize, calls)
            # What is made may be larger than what is asked for, and is cropped.
            _, factor = row.factors(pipe.vae.config)
            _, patch_h, patch_w = patch_of(part.config)
            height = max(height, layout.height * patch_h * factor)
            width = max(width, layout.width * patch_w * factor)
    parts = parts_of(pipe, row, settings)
    needs["vae"] = memory_to_decode(pipe.vae, settings.frames, height, width, parts)
    return needs


def _calls_of_a_step(pipe: DiffusionPipeline, name: str, settings: Settings) -> int:
    """Self-attention calls of a transformer in a step, which has a pass for each guidance branch."""
    from ...pipelines.acceleration import find_transformers

    transformer, family = find_transformers(pipe)[name]
    guided = settings.guidance_scale is not None and settings.guidance_scale > 1
    return len(family.modules(transformer)) * (2 if guided else 1)
