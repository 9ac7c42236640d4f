"""`guidance_free`: a pipeline whose guidance takes one forward pass a step, removable without a trace."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..acceleration.families import unwrap
from ..attached_lora import AttachedLora, LoraNotAttached, one_for_each
from .adapter_file import GuidanceFreeAdapter, GuidanceFreeError, read_adapter
from .base_check import check_base
from .beta import BetaSlot, no_slot, width_of

TRANSFORMERS = ("transformer", "transformer_2")
_NAME = "guidance_free"
"""Of the LoRA among those of the transformer."""
_HANDLE = "_vidaccel_guidance_free"
"""Attribute of the pipeline that holds the handle."""


class GuidanceFree:
    """A guidance-free adapter at work in a pipeline. Made by `guidance_free`; a context manager that removes itself."""

    def __init__(self, pipe: Any, adapters: Sequence[GuidanceFreeAdapter], base: str | Path | None) -> None:
        if hasattr(pipe, _HANDLE):
            raise RuntimeError(
                f"this {type(pipe).__name__} is guidance-free already: call remove() on the first handle."
            )
        parts = {name: unwrap(part) for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None}
        chosen = _by_part(pipe, parts, adapters)
        for name, transformer in parts.items():
            check_base(transformer, name, chosen[name], base)
        self.adapters = tuple(chosen.values())
        self._pipe: Any = pipe
        self._class: Any = type(pipe)
        self._installed: list[_Installed] = []
        self._active = True
        try:
            for name, transformer in parts.items():
                beta = functools.partial(self._beta, name)
                self._installed.append(_Installed(pipe, name, transformer, chosen[name], beta))
        except BaseException:
            self.remove()  # the first of two transformers must not stay changed when the second cannot be
            raise
        setattr(pipe, _HANDLE, self)
        pipe.__class__ = _guidance_free_class(self._class)  # type: ignore[arg-type]  # classes can be hashed

    def scale(self, part: str) -> float:
        """The guidance scale of the call that runs, of one of the transformers; 1 and less are no guidance."""
        own = getattr(self._pipe, "_guidance_scale_2", None) if part == "transformer_2" else None
        return float(self._pipe._guidance_scale if own is None else own)

    def _beta(self, part: str) -> torch.Tensor:
        return torch.tensor([1 / max(1.0, self.scale(part))])

    def check_call(self, negative_prompt: Any, negative_prompt_embeds: Any) -> None:
        """Raise GuidanceFreeError for a call that the adapter cannot do."""
        for installed, adapter in zip(self._installed, self.adapters, strict=True):
            adapter.check_negative(negative_prompt, negative_prompt_embeds)
            if hasattr(self._pipe, "_guidance_scale"):  # not yet where only prompts are encoded
                adapter.check_scale(self.scale(installed.name))

    def remove(self) -> None:
        """Put the pipeline back as it was. A second call does nothing."""
        if not self._active:
            return
        self._active = False
        for installed in self._installed:
            installed.remove()
        if hasattr(self._pipe, _HANDLE):
            self._pipe.__class__ = self._class
            delattr(self._pipe, _HANDLE)

    def __enter__(self) -> GuidanceFree:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = ", ".join(adapter.path.name for adapter in self.adapters) if self._active else "removed"
        return f"<vidaccel guidance-free: {state}>"


def guidance_free(
    pipe: Any, adapter: str | Path | Sequence[str | Path], *, base: str | Path | None = None
) -> GuidanceFree:
    """Guide a Wan pipeline with one forward pass a step instead of two, by an adapter of the recipe `gft`.

    `guidance_scale` keeps its meaning: the transformer is told 1 / guidance_scale. Works with `accelerate`, in either
    order, and beside other LoRAs. A step has half the passes, each with a LoRA that is not merged.

    Args:
        pipe: a Wan or DC-VideoGen pipeline.
        adapter: file or folder of the adapter; of a pipeline with two transformers, one for each.
        base: folder or hub id of the pipeline that the transformer is from, where it does not know itself.

    Returns:
        A handle with `remove()`.

    Raises:
        GuidanceFreeError: an adapter that cannot be read, or is for another transformer; a transformer without a place
            for it. Later, in calls of the pipeline: a negative prompt, or a guidance scale above those of the training.
        RuntimeError: the pipeline is guidance-free already.
    """
    places = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    return GuidanceFree(pipe, [read_adapter(place) for place in places], base)


def _by_part(
    pipe: Any, parts: dict[str, Any], adapters: Sequence[GuidanceFreeAdapter]
) -> dict[str, GuidanceFreeAdapter]:
    """The adapter of each transformer of a pipeline.

    Raises:
        GuidanceFreeError: not one for each, or a transformer that can have none.
    """
    kind = type(pipe).__name__
    if not parts or not hasattr(pipe, "load_lora_weights"):
        raise GuidanceFreeError(f"a {kind} has no transformer that takes a guidance-free adapter: give a Wan pipeline.")
    for transformer in parts.values():
        if refusal := no_slot(transformer):
            raise GuidanceFreeError(f"{refusal}.")
    try:
        return one_for_each(kind, parts, adapters, "adapters")
    except LoraNotAttached as error:
        raise GuidanceFreeError(str(error)) from error


class _Installed:
    """The LoRA and the embedder of beta in one transformer."""

    def __init__(self, pipe: Any, name: str, transformer: Any, adapter: GuidanceFreeAdapter, beta: Any) -> None:
        lora, embedder = adapter.weights()
        if embedder.linear.out_features != width_of(transformer):
            raise GuidanceFreeError(
                f"{adapter.path.name} is for time embeddings of {embedder.linear.out_features} numbers, and the {name} "
                f"has {width_of(transformer)}: give the adapter of this model."
            )
        self.name, self.transformer = name, transformer
        self._slot: BetaSlot | None = None
        try:
            self._lora = AttachedLora(pipe, name, transformer, lora, _NAME, adapter.path.name)
        except LoraNotAttached as error:
            raise GuidanceFreeError(str(error)) from error
        self._slot = BetaSlot(transformer, embedder, beta, _NAME, adapter.max_scale if adapter.gated else None)

    def remove(self) -> None:
        if self._slot is not None:
            self._slot.remove()
        self._lora.remove()


class _OnePass:
    """What a pipeline's class has in front while it is guidance-free: no second pass, whatever the scale."""

    do_classifier_free_guidance = False

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The first work of every call, and where negative prompts go."""
        encode = super().encode_prompt  # type: ignore[misc]  # of the pipeline
        given = inspect.signature(encode).bind(*args, **kwargs).arguments
        handle = getattr(self, _HANDLE)
        handle.check_call(given.get("negative_prompt"), given.get("negative_prompt_embeds"))
        return encode(*args, **kwargs)


@functools.cache
def _guidance_free_class(cls: type) -> type:
    """A pipeline's class that makes one pass a step; of the same name, by which pipelines are known and saved.

    diffusers' pipelines ask themselves in each step whether to make a second pass, so an object of this class changes
    nothing else, and no class is changed for other pipelines.
    """
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_OnePass, cls), own)
