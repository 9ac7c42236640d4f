"""A preset taken apart: the plain base, its model, and one lever after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipelines.presets import Preset

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
    from ..pipelines.presets import Preset

    base = model or preset.base or preset.model
    own = preset.model if preset.base and preset.model != base else base
    so_far = Preset(name=preset.name, family=preset.family)
    rows = [Stage(BASE, "as it is", base, replace(so_far, family=""))]
    if own != base:
        rows.append(Stage("model", own, own, so_far))
    so_far = replace(so_far, transformer=preset.transformer)
    levers = preset.levers()
    parts: list[tuple[str, dict[str, Any]]] = [
        ("guidance_free", {"guidance_free": preset.guidance_free}),
        ("steps", {name: getattr(preset, name) for name in ("scheduler", "loras", "num_inference_steps")}),
        ("quantize", {"quantize": preset.quantize}),
        ("method", {name: getattr(preset, name) for name in ("method", "backend", "precision", "sla")}),
        ("cache", {"cache": preset.cache}),
    ]
    for name, changes in parts:
        if name in ("guidance_free", "steps") and any(changes.values()):
            changes = {**changes, "guidance_scale": preset.guidance_scale}
        changed = replace(so_far, **changes)
        if changed == so_far or not any(value for key, value in changes.items() if key != "backend"):
            continue
        so_far = changed
        rows.append(Stage(name, _steps_text(preset) if name == "steps" else levers[name], own, so_far))
    return rows


def _steps_text(preset: Preset) -> str:
    count = preset.num_inference_steps
    told = [f"{count} steps"] if count else []
    told += [text for name, text in preset.levers().items() if name in ("scheduler", "loras")]
    return ", ".join(told)
