"""`guidance_free`: a pipeline whose guidance takes one forward pass a step, removable without a trace."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..acceleration.copies import CopiedNotPickled
from ..acceleration.families import unwrap
from ..base_check import check_base, place_of
from ..few_steps.grid import GridScheduler
from ..files.weight_files import transformer_file
from ..hooks.removed import refuse_removed
from ..hooks.running_pipeline import running_pipeline
from ..hooks.undo import GUIDANCE_FREE, PRESET
from ..loras.named_lora import one_for_each
from .adapter_file import OWN_FILE, GuidanceFreeAdapter, GuidanceFreeError, read_adapter
from .beta import no_slot
from .installed import Installed, has_adapter

TRANSFORMERS = ("transformer", "transformer_2")


class GuidanceFree:
    """A guidance-free adapter at work in a pipeline. Made by `guidance_free`; a context manager that removes itself."""

    def __init__(
        self, pipe: Any, adapters: Sequence[GuidanceFreeAdapter] | None, base: str | Path | None, merge: bool | None
    ) -> None:
        if hasattr(pipe, GUIDANCE_FREE):
            raise RuntimeError(
                f"this {type(pipe).__name__} is guidance-free already: call remove() on the first handle."
            )
        chosen = chosen_adapters(pipe, adapters, base)
        parts = {name: unwrap(getattr(pipe, name)) for name in chosen}
        self.adapters = tuple(chosen.values())
        self.sigmas = _common_sigmas(self.adapters)
        self._check_scheduler(pipe)
        for name, transformer in parts.items():
            if has_adapter(transformer):
                raise RuntimeError(
                    f"the {name} of this {type(pipe).__name__} is guidance-free already, of another pipeline that "
                    "shares it: call remove() on its handle first, or give this one a transformer of its own."
                )
        self._pipe: Any = pipe
        self._class: Any = type(pipe)
        self._installed: list[Installed] = []
        self._active = True
        try:
            for name, transformer in parts.items():
                scale = functools.partial(self._scale_of_pass, name)
                self._installed.append(Installed(pipe, name, transformer, chosen[name], scale, merge))
        except BaseException:
            self.remove()  # the first of two transformers must not stay changed when the second cannot be
            raise
        self.own_scheduler: Any = None
        """What the pipeline had before the scheduler of the adapter's steps; None where it keeps it."""
        if self.sigmas is not None:
            self.own_scheduler, pipe.scheduler = pipe.scheduler, GridScheduler(self.sigmas)
        setattr(pipe, GUIDANCE_FREE, self)
        pipe.__class__ = _guidance_free_class(self._class)  # type: ignore[arg-type]  # classes can be hashed

    def _check_scheduler(self, pipe: Any) -> None:
        """Raise GuidanceFreeError where the adapters bring a scheduler, and a preset has brought one already."""
        preset = getattr(getattr(pipe, PRESET, None), "preset", None)
        if self.sigmas is not None and preset is not None and preset.scheduler is not None:
            raise GuidanceFreeError(
                f"{self.adapters[0].path.name} was distilled to noise levels of its own, for which it brings a "
                f"scheduler, and a preset with a scheduler is at work, {preset.name}: call remove() on its handle "
                "first, and leave scheduler out."
            )

    def scale(self, part: str) -> float:
        """The guidance scale of the pipeline's call, of one of the transformers; 1 and less are no guidance."""
        own = getattr(self._pipe, "_guidance_scale_2", None) if part == "transformer_2" else None
        return float(getattr(self._pipe, "_guidance_scale", 1.0) if own is None else own)

    def _scale_of_pass(self, part: str) -> float | None:
        """The same; None for a pass of another pipeline that shares the transformer."""
        running = running_pipeline()
        if running is None or running is self._pipe:
            return self.scale(part)
        if self.sigmas is not None and isinstance(running.scheduler, GridScheduler):
            raise GuidanceFreeError(
                f"this {type(running).__name__} shares the {part} of a guidance-free pipeline, and makes its passes "
                f"without the adapter, for whose {len(self.sigmas)} steps its scheduler is: give it a scheduler of its "
                "own, as by from_pipe(pipe, scheduler=...)."
            )
        return None

    def notes(self) -> list[str]:
        """Of each transformer, where the LoRA is and what that costs; after a call of the pipeline. And whether other
        pipelines that share it made passes, which have no guidance in them."""
        return [note for installed in self._installed for note in installed.notes()] if self._active else []

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
        with contextlib.ExitStack() as stack:  # all of it, whatever one of them raises
            if hasattr(self._pipe, GUIDANCE_FREE):
                stack.callback(self._put_back)
            for installed in self._installed:
                stack.callback(installed.remove)

    def _put_back(self) -> None:
        """Have the class and the scheduler of the pipeline be its own."""
        if self.own_scheduler is not None and isinstance(self._pipe.scheduler, GridScheduler):
            self._pipe.scheduler = self.own_scheduler
        self._pipe.__class__ = self._class
        delattr(self._pipe, GUIDANCE_FREE)

    def __enter__(self) -> GuidanceFree:
        refuse_removed(self._active, "vidaccel.guidance_free")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = ", ".join(adapter.path.name for adapter in self.adapters) if self._active else "removed"
        return f"<vidaccel guidance-free: {state}>"


def guidance_free(
    pipe: Any,
    adapter: str | Path | Sequence[str | Path] | None = None,
    *,
    base: str | Path | None = None,
    merge: bool | None = None,
) -> GuidanceFree:
    """Guide a Wan pipeline with one forward pass a step instead of two, by an adapter of the recipe `gft`.

    `guidance_scale` keeps its meaning: the transformer is told 1 / guidance_scale. Works with `accelerate`, in either
    order, with offloading, and beside other LoRAs. A step has half the passes. The LoRA is merged into the weights for
    the guidance scale of a call, in its first step, and stays there until another scale, `remove()`, or saving. Passes
    of other pipelines with the same transformer, which may make two a step, are made without the adapter: each change
    from one to the other merges it anew.

    An adapter of the recipe `consistency` makes few steps as well: the pipeline has a scheduler with its noise levels
    meanwhile, which refuses another number of steps.

    Args:
        pipe: a Wan or DC-VideoGen pipeline.
        adapter: file or folder of the adapter; of a pipeline with two transformers, one for each. None for what the
            model has of its own: the built-in ones, and those that `gft` trained with all weights.
        base: folder or hub id of the pipeline that the transformer is from, where it does not know itself.
        merge: the LoRA into the weights, whose originals are kept in memory of the CPU, as many bytes as the layers
            have; False leaves it beside them, which costs time in each pass. None merges where that can be, and
            `notes()` of the handle tells: not where weights are quantised, sharded or offloaded layer by layer.

    Returns:
        A handle with `remove()`.

    Raises:
        GuidanceFreeError: an adapter that cannot be read, or is for another transformer; a transformer without a place
            for it, or whose weights cannot be changed where `merge` is True. Later, in calls of the pipeline: a
            negative prompt, a guidance scale above those of the training, or projections that were fused.
        RuntimeError: the pipeline, or another one that shares a transformer, is guidance-free already.
    """
    places = [adapter] if isinstance(adapter, str | Path) else adapter
    return GuidanceFree(pipe, None if places is None else [read_adapter(place) for place in places], base, merge)


def own_adapter(transformer: Any, part: str, base: str | Path | None = None) -> GuidanceFreeAdapter:
    """What a transformer has of its own for guidance in one pass, in the folder that it is from.

    Raises:
        GuidanceFreeError: nothing.
    """
    place = place_of(transformer, part, base)
    file = None if place is None else transformer_file(place[0], OWN_FILE, place[1])
    if file is None:
        where = "the folder that it is from" if place is None else "/".join(filter(None, place))
        raise GuidanceFreeError(
            f"the {part} has no guidance-free adapter of its own: {where} has no {OWN_FILE}. Give an adapter that the "
            "recipe gft made."
        )
    return read_adapter(file)


def chosen_adapters(
    pipe: Any, adapters: Sequence[GuidanceFreeAdapter] | None, base: str | Path | None
) -> dict[str, GuidanceFreeAdapter]:
    """The adapter of each transformer of a pipeline, checked; nothing is changed.

    Args:
        pipe: the pipeline.
        adapters: that were given; None for what the model has of its own.
        base: folder or hub id of the pipeline that the transformers are from, where they do not know themselves.

    Raises:
        GuidanceFreeError: a pipeline that takes none, an adapter of another model, or not one for each transformer.
    """
    parts = {name: unwrap(part) for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None}
    _check_parts(pipe, parts)
    if adapters is None:
        adapters = [own_adapter(transformer, name, base) for name, transformer in parts.items()]
    chosen = _by_part(pipe, parts, adapters)
    for name, transformer in parts.items():
        check_base(transformer, name, chosen[name], base, GuidanceFreeError)
    return {name: chosen[name] for name in parts}


def _check_parts(pipe: Any, parts: dict[str, Any]) -> None:
    """Raise GuidanceFreeError for a pipeline without transformers, or with one that can have no adapter."""
    kind = type(pipe).__name__
    if not parts or not hasattr(pipe, "load_lora_weights"):
        raise GuidanceFreeError(f"a {kind} has no transformer that takes a guidance-free adapter: give a Wan pipeline.")
    for transformer in parts.values():
        if refusal := no_slot(transformer):
            raise GuidanceFreeError(f"{refusal}.")


def _by_part(
    pipe: Any, parts: dict[str, Any], adapters: Sequence[GuidanceFreeAdapter]
) -> dict[str, GuidanceFreeAdapter]:
    """The adapter of each transformer of a pipeline.

    Raises:
        GuidanceFreeError: not one for each.
    """
    kind = type(pipe).__name__
    return one_for_each(kind, parts, adapters, "adapters", GuidanceFreeError)


def _common_sigmas(adapters: Sequence[GuidanceFreeAdapter]) -> tuple[float, ...] | None:
    """The noise levels of the steps that adapters were trained for.

    Raises:
        GuidanceFreeError: they are not the same of all.
    """
    found = {adapter.sigmas for adapter in adapters}
    if len(found) > 1:
        told = " and ".join(a.path.name + (f" ({len(a.sigmas)} steps)" if a.sigmas else "") for a in adapters)
        raise GuidanceFreeError(f"{told} were trained for other steps: give adapters that go together.")
    return found.pop()


class _OnePass(CopiedNotPickled):
    """What a pipeline's class has in front while it is guidance-free: no second pass, whatever the scale."""

    do_classifier_free_guidance = False

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The first work of every call, and where negative prompts go."""
        encode = super().encode_prompt  # type: ignore[misc]  # of the pipeline
        given = inspect.signature(encode).bind(*args, **kwargs).arguments
        _handle_of(self).check_call(given.get("negative_prompt"), given.get("negative_prompt_embeds"))
        return encode(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """What is saved is the pipeline without the adapter, so also with its own scheduler."""
        handle, few = _handle_of(self), self.scheduler  # type: ignore[has-type]  # of the pipeline
        if handle.own_scheduler is None:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        self.scheduler = handle.own_scheduler
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.scheduler = few


def _handle_of(pipe: Any) -> GuidanceFree:
    """That of a pipeline of such a class.

    Raises:
        GuidanceFreeError: there is none, because the pipeline was made by the class of another one.
    """
    handle = getattr(pipe, GUIDANCE_FREE, None)
    if handle is None:
        raise GuidanceFreeError(
            f"this {type(pipe).__name__} has the class of a guidance-free one and no adapter: call remove() on the "
            "handle of that one before making others by type(pipe), or make them by the class itself, as by "
            "diffusers.WanPipeline.from_pipe(pipe), which guide by two passes without the adapter."
        )
    return handle  # type: ignore[no-any-return]


@functools.cache
def _guidance_free_class(cls: type) -> type:
    """A pipeline's class that makes one pass a step; of the same name, by which pipelines are known and saved.

    diffusers' pipelines ask themselves in each step whether to make a second pass, so an object of this class changes
    nothing else, and no class is changed for other pipelines.
    """
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (_OnePass, cls), own)
