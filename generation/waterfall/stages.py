"""A preset taken apart: the plain base, its model, and one lever after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from ..levers.guidance import own_adapters
from ..models.inspected import inspect_model

if TYPE_CHECKING:
    from ...pipelines.presets import Preset

BASE = "base"
"""Name of the first row."""


@dataclass(frozen=True)
class Stage:
    """One row: the preset so far.

    Args:
        name: of the lever that it adds; `BASE` for none.
        text: what that is.
        model: it runs on; "" for the first model.
        preset: all levers so far.
    """

    name: str
    text: str
    model: str
    preset: Preset


def stages(preset: Preset, model: str = "") -> list[Stage]:
    """The rows of a preset: the plain base, its model where that is another one, and one for each lever.

    Args:
        preset: to be taken apart.
        model: of the first row; "" for the preset's base, or the model where it has none.
    """
    from ...pipelines.presets import Preset

    base = model or preset.base or preset.model
    own = preset.model if preset.base and preset.model != base else base
    # Guidance comes with the first lever that it is another with; without such a lever it is that of all videos.
    with_lever = any((preset.guidance_free, preset.loras, preset.scheduler, preset.num_inference_steps))
    so_far = Preset(
        name=preset.name, family=preset.family, guidance_scale=None if with_lever else preset.guidance_scale
    )
    rows = [Stage(BASE, "as it is", base, replace(so_far, family=""))]
    if own != base:
        rows.append(Stage("model", own, own, so_far))
    so_far = replace(so_far, transformer=preset.transformer)
    levers = preset.levers()
    in_steps = {name: getattr(preset, name) for name in ("scheduler", "loras", "num_inference_steps")}
    one_pass = preset.guidance_free
    if few := _few_steps(preset):
        # One adapter is two levers: what guides in one pass at any steps comes first, where the model has it.
        one_pass = _own_adapter(own)
        levers["guidance_free"] = ", ".join(one_pass)
        in_steps |= {"guidance_free": preset.guidance_free, "num_inference_steps": few}
    parts: list[tuple[str, dict[str, Any]]] = [
        ("guidance_free", {"guidance_free": one_pass}),
        ("steps", in_steps),
        ("quantize", {"quantize": preset.quantize}),
        ("compile", {"compile": preset.compile}),
        ("method", {name: getattr(preset, name) for name in ("method", "backend", "precision", "sla")}),
        ("cache", {"cache": preset.cache}),
        ("guidance_cache", {"guidance_cache": preset.guidance_cache}),
        ("decoder", {"decoder": preset.decoder}),
    ]
    for name, changes in parts:
        if name in ("guidance_free", "steps") and any(changes.values()):
            changes = {**changes, "guidance_scale": preset.guidance_scale}
        changed = replace(so_far, **changes)
        if changed == so_far or not any(value for key, value in changes.items() if key != "backend"):
            continue
        so_far = changed
        rows.append(Stage(name, _steps_text(so_far, bool(few)) if name == "steps" else levers[name], own, so_far))
    return rows


def _steps_text(preset: Preset, distilled: bool) -> str:
    count = preset.num_inference_steps
    told = [f"{count} steps"] if count else []
    names = ("scheduler", "loras", *(("guidance_free",) if distilled else ()))
    told += [text for name, text in preset.levers().items() if name in names]
    return ", ".join(told)


def _few_steps(preset: Preset) -> int | None:
    """The steps that the adapters of a preset were distilled to; None for any."""
    from ...pipelines.guidance_free.adapter_file import GuidanceFreeError, read_adapter
    from ...pipelines.presets.preset import OWN

    for place in preset.guidance_free:
        if place == OWN:
            continue
        try:
            adapter = read_adapter(place)
        except GuidanceFreeError as error:
            raise BadInput("preset", f"cannot be used: {str(error).rstrip('.')}") from error
        if adapter.sigmas is not None:
            return len(adapter.sigmas)
    return None


def _own_adapter(model: str) -> tuple[str, ...]:
    """What a preset says for the adapter that a model has of its own; nothing where it has none."""
    from ...pipelines.presets.preset import OWN

    try:
        return (OWN,) if model and own_adapters(inspect_model(model)) else ()
    except BadInput:
        return ()
