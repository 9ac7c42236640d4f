"""Sparse attention put into a MODEL of ComfyUI, as a clone of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...attention import DenseSchedule, Method, VideoLayout
from ...attention.backends import refusal
from ..report.wording import PRECISIONS, check_precision, check_stand_ins, chosen_precision
from .announced import announce
from .geometry import diffusion_model_of
from .learned_layers import LearnedLayers
from .models import find_geometry
from .override import KEY, NativeAttention
from .sampling import DensePart, parse_layers


def sparsify(
    model: Any,
    method_for: Callable[[VideoLayout], Method],
    *,
    name: str,
    settings: dict[str, Any],
    stand_ins: str = "",
    dense_start_percent: float = 0.0,
    dense_end_percent: float = 0.0,
    dense_layers: str = "",
    dense_steps: DenseSchedule | None = None,
    min_tokens: int = 0,
    by_length: str = "",
    backend: str = "auto",
    measure_error: int = 0,
    precision: str = PRECISIONS[0],
    weights: LearnedLayers | None = None,
    gates: LearnedLayers | None = None,
) -> tuple[Any, NativeAttention]:
    """A clone of a MODEL with sparse attention; the MODEL itself stays as it is.

    Args:
        model: ComfyUI's ModelPatcher.
        method_for: layout -> the method to use on it.
        name: of the method.
        settings: of the method, for the report.
        stand_ins: what stands for skipped keys, see `check_stand_ins`.
        dense_start_percent, dense_end_percent: shares of the sampling that stay dense, see `DensePart`.
        dense_layers: layers that stay dense, such as "0, 1, 36-39".
        dense_steps: what counts instead of these shares where a sampler does the whole sampling, see `DensePart`.
        min_tokens, by_length: videos with fewer tokens stay dense, see `NativeAttention`.
        backend: a backend's name, which then runs or raises, or "auto".
        measure_error: queries of each sparse call whose true error is measured, see `SparseAttention`.
        precision: of `PRECISIONS`.
        weights, gates: what was trained for the method in each layer, see `NativeAttention`.

    Returns:
        The clone, and the object that holds its state and report.

    Raises:
        ValueError: no model, one that has sparse attention already, a layer it does not have, a value out of bounds, or
            a backend that cannot run on its device, or not in that precision.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    diffusion_model = diffusion_model_of(model)
    if model.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        raise ValueError(
            "this MODEL has sparse attention already: two methods cannot share one model. Connect the MODEL from "
            "before the other Sparse Attention node."
        )
    check_runs(backend, model.load_device)
    check_stand_ins(backend, model.load_device, stand_ins)
    check_precision(backend, model.load_device, precision)
    geometry = find_geometry(diffusion_model)
    layers = parse_layers(dense_layers, None if geometry is None else geometry.layers(diffusion_model))
    shares: dict[str, float] = {"dense_start_percent": dense_start_percent, "dense_end_percent": dense_end_percent}
    if dense_steps is not None:
        shares = {"first_steps": dense_steps.first_steps, "last_steps": dense_steps.last_steps}
    common = shares | {
        "dense_layers": dense_layers,
        "min_tokens": min_tokens,
        "backend": backend,
        "measure_error": measure_error or None,
        "precision": chosen_precision(precision),
    }
    session = NativeAttention(
        method_for,
        name=name,
        settings=settings | common,
        dense=DensePart(dense_start_percent, dense_end_percent, layers, dense_steps),
        min_tokens=min_tokens,
        by_length=by_length,
        backend=backend,
        measure_error=measure_error,
        precision=chosen_precision(precision),
        weights=None if weights is None else weights.modules,
        gates=None if gates is None else gates.modules,
    )

    # Plain functions: older versions of ComfyUI copy the objects that they find in a model's options deeply.
    def wrapper(executor, *args, **kwargs):
        return session.forward(executor, *args, **kwargs)

    clone = model.clone()
    for learned in filter(None, (weights, gates)):
        learned.put_beside(clone)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    announce(clone, session)

    def begin(patcher):
        session.begin(queue_entry(), patcher.model)

    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, begin)
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, lambda patcher: session.end())
    return clone, session


def queue_entry() -> str | None:
    """Which entry of ComfyUI's queue is being worked on; None where its executor does not say."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return None if context is None else context.prompt_id


def check_runs(backend: str, device: torch.device) -> None:
    """Raise a `ValueError` unless a backend can compute sparse attention on a device."""
    reason = refusal(backend, device)
    if reason is not None:
        fix = "" if backend == "auto" else " Choose another, or auto."
        raise ValueError(f"backend {backend!r} cannot run this model: it {reason}.{fix}")
