"""Whether a preset can be used with a pipeline; nothing is changed."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers

from ...attention import DenseSchedule
from ...attention.backends import special_refusal
from ...attention.methods import SLA, VSA
from ...autoencoders.tiny import TinyVideoDecoder
from .. import few_steps
from ..acceleration.checks import check_noise_levels, places_of
from ..acceleration.families import FAMILIES, Family, find_transformers
from ..acceleration.installed import RUNNING
from ..acceleration.rebinding import SparseProcessor
from ..cfg_parallel.passes import SplitPasses
from ..few_steps.grid import GridScheduler
from ..few_steps.renoising import RenoisingScheduler
from ..few_steps.samplers import FEW_STEPS
from ..files.locations import is_hub_id, is_single_file
from ..forecast.level import tells_levels
from ..guidance_branches import apart_from_caches
from ..guidance_cache.handle import check_guidance_cache
from ..guidance_cache.passes import LeftOutPasses
from ..guidance_cache.samples import LeftOutSamples
from ..guidance_free.adapter_file import GuidanceFreeAdapter, GuidanceFreeError, read_adapter
from ..guidance_free.handle import chosen_adapters
from ..hooks.hooked import is_hooked
from ..hooks.undo import GUIDANCE_FREE, TINY_DECODER
from ..tiny_decoder.source import TinyDecoderError, check_own, find_decoder
from .caches import check_cache
from .compiling import check_compile
from .errors import PresetError, UnfitCacheError
from .levers import CACHES, FORECAST, Cache, SchedulerChoice
from .loras import check_loras
from .only_cache import check_no_cache
from .packages import check_packages
from .preset import OWN, Preset
from .quantise import check_quantize, is_to_do
from .tables import check_table


class Checked(NamedTuple):
    """What was found out of a pipeline that a preset can be used with.

    Args:
        parts: its transformers by name, each with its family.
        notes: what a user should know of where the LoRAs go, in sentences.
        decoder: tiny one and what it is called, see `find_decoder`; None for none.
    """

    parts: dict[str, tuple[Any, Family]]
    notes: list[str]
    decoder: tuple[TinyVideoDecoder, str] | None


def check_preset(pipe: Any, preset: Preset, base: str | Path | None) -> Checked:
    """What is known of a pipeline, if a preset can be used with it.

    Args:
        pipe: the pipeline. preset: for it.
        base: folder or hub id that the pipeline is from, where it does not know itself.

    Raises:
        PresetError: what it is that cannot be, and why.
    """
    parts = _check_model(pipe, preset)
    check_packages(preset)
    scheduler = pipe.scheduler if preset.scheduler is None else chosen_scheduler(pipe, preset)
    notes = check_loras(pipe, preset.loras)
    _check_guidance(pipe, preset, base)
    _check_guidance_cache(pipe, preset, parts)
    for name, (transformer, family) in parts.items():
        if is_to_do(pipe, preset.quantize):
            check_quantize(name, transformer, family, preset.quantize)
        if preset.compile is not None:
            check_compile(pipe, name, transformer, family)
        if preset.cache is None and preset.method is not None and preset.method.schedule != DenseSchedule():
            check_no_cache(name, transformer, "method", preset.method.name)
    if preset.cache is not None:
        _check_cache(parts, preset.cache, scheduler)
    _check_method(parts, preset, scheduler)
    return Checked(parts, notes, _decoder(pipe, preset))


def _check_model(pipe: Any, preset: Preset) -> dict[str, tuple[Any, Family]]:
    try:
        parts = find_transformers(pipe)
    except TypeError as error:
        raise PresetError("", f"{preset.name} cannot be used: {str(error).rstrip('.')}") from error
    if not hasattr(pipe, "scheduler"):
        raise PresetError("", f"a {type(pipe).__name__} is no pipeline", "Give the pipeline, not its transformer.")
    if preset.family and preset.family not in [family.name for family in FAMILIES]:
        known = ", ".join(family.name for family in FAMILIES)
        raise PresetError("family", f"there is none of that name; there are {known}", value=preset.family)
    transformer: Any
    for name, (transformer, family) in parts.items():
        if preset.family and family.name != preset.family:
            problem = f"{preset.name} is for {preset.family}, and the {name} of this pipeline is of {family.name}"
            raise PresetError("family", problem, "Take a preset of that family, or the model of this one.")
        differing = differences(preset.transformer, transformer.config)
        if differing:
            model = f" ({preset.model})" if preset.model else ""
            problem = f"{preset.name} is for another model{model}: {'; '.join(differing)}"
            raise PresetError("transformer", problem, "Take the preset of this model, or the model of this preset.")
    return parts


def differences(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """ "num_layers 30 there, 40 here" of settings that a transformer has otherwise."""
    plain = json.loads(json.dumps({name: config.get(name) for name in wanted}, default=str))
    there = json.loads(json.dumps(dict(wanted), default=str))
    return [f"{name} {there[name]} there, {plain[name]} here" for name in there if there[name] != plain[name]]


def scheduler_class(choice: SchedulerChoice) -> Any:
    """The class of a scheduler that a preset names.

    Raises:
        PresetError: there is no such class, or it lacks a setting.
    """
    cls: Any = getattr(few_steps if choice.name in FEW_STEPS else diffusers, choice.name, None)
    if not (isinstance(cls, type) and hasattr(cls, "set_timesteps") and hasattr(cls, "from_config")):
        raise PresetError("scheduler", "diffusers has no scheduler of that name", value=choice.name)
    known = _settings_known(cls)
    for name in choice.settings:
        if name not in known:
            raise PresetError("scheduler", f"{choice.name} has no setting {name}; it has {', '.join(known)}")
    return cls


def _settings_known(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "kwargs"]


def chosen_scheduler(pipe: Any, preset: Preset) -> Any:
    """The scheduler of a preset, with what it does not set from that of the pipeline.

    Raises:
        PresetError: there is no such class, it lacks a setting or refuses a value, or it cannot take the place of the
            pipeline's own.
    """
    choice = preset.scheduler
    cls = scheduler_class(choice)
    known = _settings_known(cls)
    _check_replaced(pipe, choice, known)
    stated = _stated(pipe.scheduler, known)
    if issubclass(cls, GridScheduler | RenoisingScheduler) and not isinstance(pipe.scheduler, cls):
        # Others have settings of the same name that mean something else: UniPC's sigma_max is of Karras' levels.
        stated = {name: value for name, value in stated.items() if name == "num_train_timesteps"}
    try:
        made = cls.from_config(stated, **{**_of_flow(pipe.scheduler, known), **choice.settings})
    except (ValueError, TypeError, NotImplementedError) as error:
        raise PresetError("scheduler", str(error).rstrip("."), value=choice.name) from error
    if _flows(pipe.scheduler) and "prediction_type" in known and not _flows(made):
        problem = f"the model is of flow matching, and {choice.name} is not made for that"
        fix = "Take one of FlowMatch..., or one with a setting use_flow_sigmas."
        raise PresetError("scheduler", problem, fix, value=choice.name)
    check_table(pipe, made)
    _check_count(made, preset.num_inference_steps)
    return made


def _check_count(made: Any, steps: int | None) -> None:
    """Raise PresetError for a number of steps that a scheduler of this package would refuse in the call."""
    if steps is None:
        return
    if isinstance(made, GridScheduler) and steps != made.fixed_steps:
        problem = f"the GridScheduler has {made.fixed_steps} noise levels, one for each step"
    elif isinstance(made, RenoisingScheduler) and steps > made.most_steps:
        problem = f"the {type(made).__name__} has times for 1 to {made.most_steps} steps"
    else:
        return
    raise PresetError("num_inference_steps", problem, "Give as many, or leave it out.", steps)


def _flows(scheduler: Any) -> bool:
    """Whether a scheduler has the noise levels of flow matching."""
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler | RenoisingScheduler):
        return True
    # A config also has what was said to another class that it was made from, which this one does not read.
    has = "use_flow_sigmas" in _settings_known(type(scheduler)) and scheduler.config.get("use_flow_sigmas")
    return type(scheduler).__name__.startswith("FlowMatch") or bool(has)


def _check_replaced(pipe: Any, choice: SchedulerChoice, known: Sequence[str]) -> None:
    """Raise PresetError where what the pipeline has cannot give its place to another scheduler."""
    own, name = pipe.scheduler, type(pipe.scheduler).__name__
    if getattr(getattr(pipe, GUIDANCE_FREE, None), "sigmas", None) is not None:
        problem = "the pipeline is guidance-free by an adapter that was distilled to noise levels of its own"
        raise PresetError("scheduler", problem, "Leave scheduler out.", choice.name)
    if isinstance(own, RenoisingScheduler) and choice.name != name:
        problem = f"the model was distilled for the times and noise of the {name}, and {choice.name} has others"
        raise PresetError("scheduler", problem, "Leave scheduler out.", value=choice.name)
    shift = next((name for name in ("flow_shift", "shift") if name in known), None)
    if isinstance(own, GridScheduler) and shift is not None and shift not in choice.settings:
        problem = f"the GridScheduler of the pipeline has noise levels and no shift, which {choice.name} needs"
        raise PresetError("scheduler", problem, f"Give {shift} in its settings.", value=choice.name)


def _stated(own: Any, known: Sequence[str]) -> dict[str, Any]:
    """The config of a scheduler; of a GridScheduler its own settings, since those of the class below say nothing."""
    if isinstance(own, GridScheduler):
        return {name: own.config[name] for name in ("sigmas", "num_train_timesteps") if name in known}
    return dict(own.config)


def _of_flow(own: Any, known: Sequence[str]) -> dict[str, Any]:
    """What a scheduler of flow matching says by other names than a class that has these settings."""
    if not _flows(own):
        return {}
    config = _stated(own, known)
    shift = config.get("shift", config.get("flow_shift"))
    told = {"shift": shift, "flow_shift": shift, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return {name: value for name, value in told.items() if name in known and value is not None}


def check_few_steps(preset: Preset, adapters: Sequence[GuidanceFreeAdapter]) -> None:
    """Raise PresetError where adapters for few steps have other steps than a preset, or a scheduler beside them.

    Args:
        preset: of which steps and scheduler are looked at.
        adapters: its own, or those that are given instead.
    """
    for adapter in adapters:
        if adapter.sigmas is None:
            continue
        count, name = len(adapter.sigmas), adapter.path.name
        if preset.scheduler is not None:
            problem = f"{name} was distilled to noise levels of its own, for which it brings a scheduler"
            raise PresetError("scheduler", problem, "Leave scheduler out.", preset.scheduler.name)
        if preset.num_inference_steps not in (None, count):
            problem = f"{name} was distilled to {count} steps"
            raise PresetError("num_inference_steps", problem, "Give that, or leave it out.", preset.num_inference_steps)


def _check_guidance(pipe: Any, preset: Preset, base: str | Path | None) -> None:
    if not preset.guidance_free:
        return
    if hasattr(pipe, GUIDANCE_FREE):
        raise PresetError(
            "guidance_free", "the pipeline is guidance-free already", "Call remove() on its handle first."
        )
    try:
        own = preset.guidance_free == (OWN,)
        given = None if own else [read_adapter(place) for place in preset.guidance_free]
        chosen = chosen_adapters(pipe, given, base)
        check_few_steps(preset, list(chosen.values()))
        if preset.guidance_scale is not None:
            for adapter in chosen.values():
                adapter.check_scale(preset.guidance_scale)
    except GuidanceFreeError as error:
        raise PresetError("guidance_free", str(error).rstrip(".")) from error


def _check_guidance_cache(pipe: Any, preset: Preset, parts: Mapping[str, tuple[Any, Family]]) -> None:
    if preset.guidance_cache is None:
        return
    try:
        check_guidance_cache(pipe)
    except (TypeError, RuntimeError) as error:
        raise PresetError("guidance_cache", str(error).rstrip(".")) from error
    if preset.cache is not None and (problem := apart_from_caches(parts, preset.cache.name)):
        raise PresetError("guidance_cache", problem, "Leave one of both out.")


def _check_cache(parts: Mapping[str, tuple[Any, Family]], cache: Cache, scheduler: Any) -> None:
    """Raise PresetError for a cache that cannot be used, with one that can."""
    try:
        _check_fits(parts, cache, scheduler)
    except UnfitCacheError as error:
        other = next((f", such as {name}" for name in CACHES if _fits(parts, name, scheduler)), "")
        raise PresetError("cache", error.problem, f"Take another cache{other}, or leave it out.", cache.name) from None


def _check_fits(parts: Mapping[str, tuple[Any, Family]], cache: Cache, scheduler: Any) -> None:
    for name, (transformer, family) in parts.items():
        check_cache(name, transformer, len(family.modules(transformer)), cache)
        _check_inside(name, transformer, family, cache.name)
    if cache.name == FORECAST and not tells_levels(scheduler):
        raise UnfitCacheError(f"a {type(scheduler).__name__} does not tell how much noise is in a step", cache.name)


def _fits(parts: Mapping[str, tuple[Any, Family]], cache: str, scheduler: Any) -> bool:
    """Whether a cache can be used with the settings that it has by itself."""
    if CACHES[cache].package:
        return False  # what another package has for a model shows where it is put in
    try:
        _check_fits(parts, Cache(cache), scheduler)
    except PresetError:
        return False
    return True


def _check_inside(part: str, transformer: Any, family: Family, cache: str) -> None:
    """Raise PresetError for a cache that would come around what decides which passes are made."""
    halved, shared = is_hooked(transformer, LeftOutSamples), is_hooked(transformer, SplitPasses)
    if halved and (problem := apart_from_caches({part: (transformer, family)}, cache)):
        raise PresetError("cache", problem, "Leave one of both out.", cache)
    if CACHES[cache].around and (shared or is_hooked(transformer, LeftOutPasses)):
        what, function = ("cfg_parallel", "cfg_parallel") if shared else ("a guidance cache", "guidance_cache")
        problem = f"the {part} has {what}, around which it would see passes that are not made here"
        fix = f"Call remove() on its handle, apply the preset, and call {function} again."
        raise PresetError("cache", problem, fix, cache)


def check_source(decoder: str | None, location: str | None = None, model: str = "") -> None:
    """Raise PresetError for a tiny decoder that is no file, no folder and no hub id; one that is has to be read.

    Args:
        decoder: of the preset.
        location: of the pipeline that is yet to be loaded, whose own one it may be.
        model: what that is called; the name of its folder by default.
    """
    if decoder == OWN and location is not None:
        try:
            check_own(Path(location).expanduser(), model)
        except TinyDecoderError as error:
            raise PresetError("decoder", str(error).rstrip(".")) from error
    if decoder is None or decoder == OWN or os.path.exists(Path(decoder).expanduser()):
        return
    if is_hub_id(decoder) and not is_single_file(decoder):
        return
    fix = "Give a file such as taew2_1.safetensors, a folder or a hub id."
    raise PresetError("decoder", "there is no such file or folder", fix, decoder)


def _decoder(pipe: Any, preset: Preset) -> tuple[TinyVideoDecoder, str] | None:
    if preset.decoder is None:
        return None
    if hasattr(getattr(pipe, "vae", None), TINY_DECODER):
        raise PresetError("decoder", "the pipeline has a tiny one already", "Call remove() on its handle first.")
    try:
        return find_decoder(pipe, None if preset.decoder == OWN else preset.decoder)
    except TinyDecoderError as error:
        raise PresetError("decoder", str(error).rstrip(".")) from error


def _check_method(parts: Mapping[str, tuple[Any, Family]], preset: Preset, scheduler: Any) -> None:
    method = preset.method
    if method is None:
        return
    for name, (transformer, family) in parts.items():
        if any(isinstance(m.processor, SparseProcessor) for m in family.modules(transformer).values()):
            fix = f"Call vidaccel.restore(pipe) first; {RUNNING}"
            raise PresetError("method", f"the {name} is accelerated already", fix)
    if method.needs_weights and not isinstance(method, SLA | VSA):
        raise PresetError("method", "it needs weights that were trained for it", value=method.name)
    for transformer, _ in parts.values():
        place = places_of(transformer)[-1]  # offloaded weights lie on the CPU between calls
        reason = special_refusal(preset.backend, place, preset.precision, method.second_stage)
        if reason is not None:
            lever = "method" if preset.precision is None else "precision"
            raise PresetError(lever, reason.rstrip("."), "Leave it out.", value=preset.precision or method.name)
    if method.schedule.needs_sigma:
        try:
            check_noise_levels(scheduler, method.schedule)
        except ValueError as error:
            raise PresetError("attention", str(error).rstrip(".")) from error
