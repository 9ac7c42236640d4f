"""Where the weights of a diffusers pipeline are while ComfyUI runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..memory import decoder_bytes, transformer_bytes

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..attention import VideoLayout
    from ..request import Settings


class Residency:
    """Has each part of a pipeline brought to the device when it begins to work.

    Only one part needs to be there at a time; whether the others leave is for `load` to decide.

    Args:
        device: where the parts work.
        load: `(part, working memory in bytes)`: called when another part than the last one begins.
        check: called before every use of a part; raises where the user has stopped the run.
    """

    def __init__(
        self,
        device: torch.device,
        load: Callable[[torch.nn.Module, int], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.device, self._load, self._check = device, load, check
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

    def begin(self, pipe: DiffusionPipeline, layout: VideoLayout, settings: Settings) -> None:
        """A run begins: something else may have taken the device in the meantime."""
        self._at_work = None
        self._needs = working_memory(pipe, layout, settings)

    def _enter(self, name: str, part: torch.nn.Module) -> None:
        self._check()
        if part is not self._at_work:
            self._load(part, self._needs.get(name, 0))
            self._at_work = part


def working_memory(pipe: DiffusionPipeline, layout: VideoLayout, settings: Settings) -> dict[str, int]:
    """A rough estimate of what each part needs beside its weights, in bytes, for ComfyUI to make room."""
    needs = {}
    for name in ("transformer", "transformer_2"):
        part = getattr(pipe, name, None)
        if part is not None:
            width = part.config.num_attention_heads * part.config.attention_head_dim
            needs[name] = transformer_bytes(layout.tokens, width, part.dtype.itemsize)
    needs["vae"] = decoder_bytes(pipe.vae.config, settings.height, settings.width, pipe.vae.dtype.itemsize)
    return needs
