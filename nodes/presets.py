"""Presets in ComfyUI: which there are, on a pipeline of diffusers, and what of one a native MODEL can have.

No ComfyUI module is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation.levers.methods import SET_BY_DENSITY
from ..generation.levers.presets import request_preset
from .pipeline.pipelines import VideoPipeline, require_packages
from .report.wording import InputError, plain_messages
from .watched import State, state_of

if TYPE_CHECKING:
    from ..attention import DenseSchedule, Method
    from ..pipelines.forecast.settings import ForecastSettings
    from ..pipelines.guidance_cache.settings import GuidanceCache
    from ..pipelines.presets import Preset
    from .native.geometry import Geometry

FOLDER = "vidaccel_presets"
"""Below ComfyUI's folder of models: presets of one's own."""
ELSEWHERE = {
    "cache": "Forecast Cache, EasyCache or another node for caches",
    "loras": "LoraLoaderModelOnly",
    "scheduler": "the sampler's scheduler, and ModelSamplingSD3 for a shift",
    "num_inference_steps": "the sampler's steps",
    "guidance_scale": "the sampler's cfg",
    "quantize": "weight_dtype of Load Diffusion Model",
    "compile": "TorchCompileModel, behind this node",
    "decoder": "Load VAE, which lists tiny decoders in models/vae_approx",
}
"""What a native MODEL does not get from a preset -> what ComfyUI has for it."""
TRAINED = {
    "sla": "whose weights a MODEL gets from Apply SLA",
    "vsa": "whose gates a MODEL gets from Apply VSA",
}
"""Likewise of methods that need weights."""
ADAPTER = "Guidance-Free"
"""The node that puts an adapter for guidance in one pass into a MODEL."""


def shipped_names() -> list[str]:
    """The presets of the package, without reading them: their names, in order."""
    folder = Path(__file__).resolve().parents[1] / "pipelines" / "presets" / "shipped"
    return sorted(file.stem for file in folder.glob("*.yaml"))


def find_presets(roots: Sequence[str]) -> dict[str, Path | str]:
    """What the menu of presets has: those of the package, and the files of some folders.

    Args:
        roots: folders for presets; those that do not exist are left out.

    Returns:
        What is shown -> what `load_preset` takes.
    """
    found: dict[str, Path | str] = {name: name for name in shipped_names()}
    for root in roots:
        for folder, below, files in os.walk(root, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in sorted(files):
                if name.endswith((".yaml", ".yml", ".json")):
                    file = Path(folder, name)
                    found.setdefault(file.relative_to(root).as_posix(), file)
    return found


def chosen_preset(choice: str, path: str, roots: Sequence[str]) -> Preset:
    """The preset of a path, otherwise of the menu.

    Raises:
        InputError: it is gone, or cannot be read.
    """
    found = find_presets(roots)
    if not path.strip() and choice not in found:
        raise InputError(f"preset is {choice}: it is no longer there; there are {', '.join(found)}.")
    with plain_messages():
        preset = request_preset(path.strip() or found[choice])
    assert preset is not None
    return preset


def state_of_preset(choice: str | None, path: str | None, roots: Sequence[str]) -> State | None:
    """`state_of` the file of a preset, unless it is one of the package, and of the adapters, LoRAs and the decoder that
    it names; None in a choice or path that comes through a link."""
    choice, path = choice or "", (path or "").strip()
    found = path or find_presets(roots).get(choice)
    if not found:
        return None
    made = (state_of(found) or ()) if path or isinstance(found, Path) else ()
    try:
        preset = chosen_preset(choice, path, roots)
    except InputError:
        return made or None  # what runs says what is wrong with it
    places: list[str | Path | None] = [
        *preset.guidance_free,
        *preset.sla,
        *(lora.path for lora in preset.loras),
        preset.decoder,
    ]
    for place in places:
        made += state_of(place) or ()
    return made or None


def with_preset(pipeline: VideoPipeline, preset: Preset) -> VideoPipeline:
    """The same weights with a preset, the pipeline that came in as it is.

    Raises:
        InputError: another preset, method or adapter is there already, the preset is for another model, or has what a
            pipeline of ComfyUI's cannot have; or a package is missing.
    """
    require_packages("presets for pipelines need")
    from ..generation.levers.presets import check_beside
    from ..generation.requests.settings import Settings

    if pipeline.preset is not None:
        raise InputError(f"the preset {pipeline.preset.name} is there already: connect the pipeline from before it.")
    for there, lever, node in (
        (pipeline.acceleration, preset.method, "Accelerate Pipeline"),
        (pipeline.trained, preset.method, "Pipeline LoRA, with a LoRA for one attention alone,"),
        (pipeline.guidance_free, preset.guidance_free, "Guidance-Free Pipeline"),
    ):
        if there and lever:
            raise InputError(f"preset {preset.name} and {node} both set it: leave one of the two out.")
    if preset.quantize is not None:
        raise InputError(
            f"preset {preset.name} has layers in 8 bits, and ComfyUI moves the weights of a pipeline as they are: take "
            "quantize out of it, or use `vidaccel generate --preset`."
        )
    with plain_messages():
        if preset.guidance_cache is not None and pipeline.guidance_free:
            raise InputError(f"preset {preset.name} has a guidance cache, and guidance in one pass has no second one.")
        check_beside(preset, pipeline.facts, Settings("a preset", guidance_scale=preset.guidance_scale))
    return replace(pipeline, preset=preset)


@dataclass(frozen=True)
class NativePart:
    """What a native MODEL gets of a preset.

    Args:
        method: None for dense.
        dense_start_percent, dense_end_percent: of `DensePart`.
        dense_layers: in words of the nodes.
        dense_steps: of the preset, for a sampler that does the whole sampling.
        adapter: guidance-free; None for none.
        guidance: of the adapter.
        forecast, guidance_cache: caches that a MODEL can have; None for none.
        left: what it does not get and its values, with what ComfyUI has for it.
    """

    method: Method | None = None
    dense_start_percent: float = 0.0
    dense_end_percent: float = 0.0
    dense_layers: str = ""
    dense_steps: DenseSchedule | None = None
    adapter: Path | None = None
    guidance: float = 1.0
    forecast: ForecastSettings | None = None
    guidance_cache: GuidanceCache | None = None
    left: tuple[str, ...] = ()


def native_part(preset: Preset, geometry: Geometry, model: Any) -> NativePart:
    """What a native MODEL can have of a preset.

    Args:
        preset: the preset.
        geometry: of the MODEL's class.
        model: its diffusion model.

    Raises:
        InputError: it is for another model, has nothing for a MODEL, or says in steps or noise levels what ComfyUI
            counts in shares of the sampling.
    """
    _check_model(preset, geometry, model)
    left = _left(preset)
    method = None if "method" in left else preset.method
    adapters = () if "guidance_free" in left else preset.guidance_free
    if adapters and preset.guidance_scale is None:
        raise InputError(f"preset {preset.name} has guidance_free and no guidance_scale, which a MODEL needs: add it.")
    told = tuple(left.values())
    forecast = _forecast(preset)
    if forecast is not None and preset.guidance_cache is not None:
        raise InputError(
            f"preset {preset.name} has a forecast cache and a guidance cache, and a MODEL can have one of the two."
        )
    if method is None and not adapters and forecast is None and preset.guidance_cache is None:
        raise InputError(
            f"preset {preset.name} has no method, no adapter for guidance and no cache that a MODEL can take, and a "
            f"MODEL gets nothing else of a preset: {'; '.join(told) or 'it is empty'}."
        )
    shares: dict[str, Any] = {}
    if method is not None:
        shares = _shares(preset) | {"dense_steps": replace(method.schedule, first_layers=0, last_layers=0)}
    adapter = Path(adapters[0]) if adapters else None
    scale = 1.0 if preset.guidance_scale is None else preset.guidance_scale
    dense = "" if method is None else _dense_layers(method.schedule, geometry, model)
    caches: dict[str, Any] = {"forecast": forecast, "guidance_cache": preset.guidance_cache}
    return NativePart(method, **shares, dense_layers=dense, adapter=adapter, guidance=scale, **caches, left=told)


def _check_model(preset: Preset, geometry: Geometry, model: Any) -> None:
    """Raise InputError for a preset of another family or size."""
    if preset.family and preset.family not in geometry.presets:
        fix = f"one for {' or '.join(geometry.presets)}" if geometry.presets else "one that names no family"
        raise InputError(
            f"preset {preset.name} is for {preset.family}, and this MODEL is {geometry.family}: take {fix}."
        )
    if differing := geometry.differences(model, preset.transformer):
        raise InputError(
            f"preset {preset.name} is for another model: {'; '.join(differing)}. Take the preset of this model."
        )


def _forecast(preset: Preset) -> ForecastSettings | None:
    from ..pipelines.presets.levers import FORECAST, forecast_settings

    return forecast_settings(preset.cache) if preset.cache is not None and preset.cache.name == FORECAST else None


def _left(preset: Preset) -> dict[str, str]:
    """Lever -> it and its value, with why a MODEL does not get it or what ComfyUI has for it."""
    made, method, adapters = {}, preset.method, preset.guidance_free
    if method is not None and method.needs_weights:
        made["method"] = f"method {method.name}, {TRAINED.get(method.name, 'whose weights a MODEL cannot have')}"
    at = "" if preset.guidance_scale is None else f", with a guidance of {preset.guidance_scale:g}"
    if adapters == ("own",):
        made["guidance_free"] = f"guidance_free, the adapter of a folder of diffusers: {ADAPTER} takes a file{at}"
    elif len(adapters) > 1:
        made["guidance_free"] = f"guidance_free, one for each transformer: {ADAPTER} before each sampler takes one{at}"
    return made | {name: f"{name} {value}: {ELSEWHERE[name]}" for name, value in _values(preset).items()}


def _values(preset: Preset) -> dict[str, str]:
    """Lever that is for other nodes to set -> its value, in words."""
    cache, scheduler, quantize = preset.cache, preset.scheduler, preset.quantize
    made = {
        "cache": "" if cache is None or _forecast(preset) else f"{cache.name}={cache.limit:g}",
        "loras": ", ".join(f"{lora.path.name} ({lora.weight:g})" for lora in preset.loras),
        "scheduler": "" if scheduler is None else scheduler.name,
        "num_inference_steps": str(preset.num_inference_steps or ""),
        # With an adapter it is that node's.
        "guidance_scale": "" if preset.guidance_scale is None or preset.guidance_free else f"{preset.guidance_scale:g}",
        "quantize": "" if quantize is None else quantize.kind,
        "compile": "" if preset.compile is None else preset.compile.in_words(),
        "decoder": preset.decoder or "",
    }
    if scheduler is not None and scheduler.settings:
        made["scheduler"] += f" ({', '.join(f'{name} {value}' for name, value in scheduler.settings.items())})"
    return {name: value for name, value in made.items() if value}


def _shares(preset: Preset) -> dict[str, float]:
    """Dense steps as shares of the sampling, for samplers that do a part of it."""
    schedule = preset.method.schedule
    if schedule.needs_sigma:
        raise InputError(
            f"preset {preset.name} keeps steps dense by noise levels of diffusers, which ComfyUI counts otherwise: use "
            "first_steps and last_steps."
        )
    made = {}
    for name, value in (
        ("dense_start_percent", schedule.first_steps),
        ("dense_end_percent", schedule.last_steps),
    ):
        if isinstance(value, int) and value:
            if preset.num_inference_steps is None:
                raise InputError(
                    f"preset {preset.name} keeps {value} steps dense, and ComfyUI counts in shares of the sampling: "
                    "give a fraction, or num_inference_steps."
                )
            value = value / preset.num_inference_steps
        made[name] = float(value)
    return made


def _dense_layers(schedule: DenseSchedule, geometry: Geometry, model: Any) -> str:
    """Counted over the main blocks, as in diffusers; an extra block is dense with the one that it runs beside."""
    layers = geometry.main_layers(model)
    dense = [layer for layer in range(layers) if schedule.layer_reason(layer, layers)]
    return ", ".join(map(str, geometry.with_extra(model, dense)))


def native_settings(preset: Preset, part: NativePart) -> dict[str, Any]:
    """What a MODEL got of a preset, for the report: caches, and the settings of the method that count; and what it did
    not get."""
    left = {"not taken": "; ".join(part.left)} if part.left else {}
    caches = {}
    if part.forecast is not None:
        caches["cache"] = f"{preset.cache.name}={preset.cache.limit:g}"
    if part.guidance_cache is not None:
        caches["guidance_cache"] = part.guidance_cache.in_words()
    others = {"schedule"}  # what stays dense is told beside these
    if getattr(part.method, "density", None) is not None:
        others.update(SET_BY_DENSITY.get(part.method.name, ()))
    own = {f.name: getattr(part.method, f.name) for f in fields(part.method) if f.name not in others}
    return {"preset": preset.name} | left | caches | own
