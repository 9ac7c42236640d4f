"""`lengthen`: a pipeline that makes longer videos with a LoRA and the attention that it was trained for."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...attention.account.records import RunReport
from ...attention.methods import Method, resolve_method
from ..acceleration.families import unwrap
from ..acceleration.handle import Handle, accelerate
from ..base_check import check_base
from ..hooks.removed import refuse_removed
from ..hooks.unsaved import TAKE_OUT, Unsaved
from ..loras.named_lora import NamedLora, one_for_each
from .adapter_file import LengthAdapter, read_length
from .rotary import TRANSFORMERS, frames_of_a_token, riflex
from .trained import LengthError

LENGTHENED = "_vidaccel_lengthened"
"""Attribute of a pipeline that holds its handle for longer videos."""

_NAME = "length"
"""Of the LoRA among those of the transformer."""


class Lengthened:
    """A LoRA for longer videos at work in a pipeline. Made by `lengthen`; a context manager that removes itself."""

    def __init__(
        self,
        pipe: Any,
        adapters: Sequence[LengthAdapter],
        method: Method | str | None,
        backend: str,
        measure_error: int,
        precision: str | None,
        base: str | Path | None,
    ) -> None:
        if hasattr(pipe, LENGTHENED):
            raise RuntimeError(
                f"this {type(pipe).__name__} is lengthened already: call remove() on its handle, or "
                "vidaccel.restore(pipe), first."
            )
        parts = {name: unwrap(part) for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None}
        self.adapters = tuple(_by_part(pipe, parts, adapters)[name] for name in parts)
        trained = self.adapters[0].trained
        for name, adapter in zip(parts, self.adapters, strict=True):
            if adapter.trained.riflex != trained.riflex:
                raise LengthError("one of the LoRAs was trained with RIFLEx and another without: train both alike.")
            adapter.trained.check_method(trained.method)
            if method is not None:
                adapter.trained.check_method(None if method == "dense" else resolve_method(method))
            check_base(parts[name], name, adapter, base, LengthError)
        if precision is not None and trained.method is None:
            raise LengthError(
                f"precision is {precision!r}: it is that of sparse attention, and {trained.name} was trained with "
                "dense attention; leave precision out."
            )
        self.sparse: Handle | None = None
        self._pipe = pipe
        # Objects with `remove()`, and no closures: a copy of the pipeline must undo what it has, not the original's.
        self._undo: list[Any] = []
        self._loras: list[NamedLora] = []
        try:
            for (name, transformer), adapter in zip(parts.items(), self.adapters, strict=True):
                matrices, file = adapter.weights(), adapter.path.name
                self._loras.append(NamedLora(pipe, name, transformer, matrices, _NAME, file, LengthError))
                self._undo.append(self._loras[-1])
                frames = _FramesChecked(adapter, self)
                self._undo.append(transformer.register_forward_pre_hook(frames, with_kwargs=True))
            self._undo.append(Unsaved(pipe, self._why_not_saved))
            if trained.riflex is not None:
                self._undo.append(riflex(pipe, trained.riflex))
            if trained.method is not None:
                self.sparse = accelerate(
                    pipe, trained.method, backend=backend, measure_error=measure_error, precision=precision
                )
                self._undo.append(self.sparse)
            setattr(pipe, LENGTHENED, self)
        except BaseException:
            self.remove()
            raise

    def report(self) -> RunReport | None:
        """What attention did; None where the LoRA was trained with dense attention."""
        return None if self.sparse is None else self.sparse.report()

    def _why_not_saved(self) -> str:
        if not any(lora.is_apart() for lora in self._loras):
            return ""
        return f"it has {' and '.join(adapter.path.name for adapter in self.adapters)} as a LoRA; {TAKE_OUT}"

    def has(self, transformer: Any) -> bool:
        """Whether a transformer, without what wraps it, is one of the pipeline's. A copy is not."""
        return any(unwrap(getattr(self._pipe, name, None)) is transformer for name in TRANSFORMERS)

    def remove(self) -> None:
        """Put the pipeline back as it was. A second call does nothing.

        Raises:
            RuntimeError: the LoRA was fused into weights that are offloaded layer by layer. All else is undone; a
                second call, after the offloading was taken off, undoes it.
        """
        with contextlib.ExitStack() as stack:  # all of it, whatever one of them raises
            for each in self._undo:
                stack.callback(each.remove)
        self._undo, self._loras = [], []
        if getattr(self._pipe, LENGTHENED, None) is self:
            delattr(self._pipe, LENGTHENED)

    def __enter__(self) -> Lengthened:
        refuse_removed(getattr(self._pipe, LENGTHENED, None) is self, "vidaccel.lengthen")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<vidaccel longer videos: {self.adapters[0].trained}>"


def lengthen(
    pipe: Any,
    adapter: str | Path | Sequence[str | Path],
    *,
    method: Method | str | None = None,
    backend: str = "auto",
    measure_error: int = 0,
    precision: str | None = None,
    base: str | Path | None = None,
) -> Lengthened:
    """Make longer videos with Wan or HunyuanVideo, by a LoRA of the recipe `length` and all that it was trained with.

    Its file says what that is: the method of sparse attention with all settings, the layers that stay dense, and RIFLEx
    where it was trained with it.

    Args:
        pipe: the pipeline.
        adapter: file or folder of the LoRA; of a pipeline with two transformers, one for each.
        method: "dense", a name or a config, where it is to be checked that it is that of the training; None for that.
        backend, measure_error, precision: see `accelerate`.
        base: folder or hub id of the pipeline that the transformer is from, where it does not know itself.

    Returns:
        A handle with `report()` and `remove()`.

    Raises:
        LengthError: a file that cannot be read, or is for another transformer; another attention than that of the
            training, with the differences named; a precision for dense attention; LoRAs of the transformer that are
            disabled. Later, in calls of the pipeline: a video longer than those, or the LoRA was unloaded or switched
            off.
        RuntimeError: the pipeline is lengthened or accelerated already, or the precision cannot be had here.
    """
    places = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    return Lengthened(pipe, [read_length(place) for place in places], method, backend, measure_error, precision, base)


def restore(pipe: Any) -> None:
    """Undo `lengthen` where the handle is lost, also of another pipeline that has a transformer in common with this
    one: all of it, since what lies in the transformer is only a part. Does nothing otherwise."""
    if (handle := getattr(pipe, LENGTHENED, None)) is not None:
        handle.remove()
    for name in TRANSFORMERS:
        if (part := getattr(pipe, name, None)) is None:
            continue
        for hook in list(unwrap(part)._forward_pre_hooks.values()):
            owner = hook.owner() if isinstance(hook, _FramesChecked) else None
            if owner is not None and owner.has(unwrap(part)):
                owner.remove()


class _FramesChecked:
    """A hook before the forward pass that refuses videos longer than those of the training."""

    def __init__(self, adapter: LengthAdapter, owner: Lengthened) -> None:
        self.adapter = adapter
        self.owner = weakref.ref(owner)  # else a copy of a transformer would be one of the pipeline

    def __call__(self, transformer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        latents: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        self.adapter.trained.check_frames(latents.shape[2] // frames_of_a_token(transformer.config))


def _by_part(pipe: Any, parts: dict[str, Any], adapters: Sequence[LengthAdapter]) -> dict[str, LengthAdapter]:
    """The adapter of each transformer of a pipeline; LengthError where there is not one for each."""
    kind = type(pipe).__name__
    if not parts or not hasattr(pipe, "load_lora_weights"):
        raise LengthError(f"a {kind} takes no LoRA for longer videos: give a Wan or HunyuanVideo pipeline.")
    return one_for_each(kind, parts, adapters, "LoRAs", LengthError)
