"""Presets and their levers in a request: what they mean for its other fields, and at work in a run."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...pipelines.errors import shortened
from ..errors import BadInput, mention
from ..models.places import locate
from .methods import DENSE

if TYPE_CHECKING:
    import torch

    from ...pipelines.guidance_cache.settings import GuidanceCache
    from ...pipelines.guidance_free.adapter_file import GuidanceFreeAdapter
    from ...pipelines.presets import Cache, Compile, Preset, PresetError, Quantize
    from ..models.facts import ModelFacts
    from ..requests.settings import Settings

_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/[^/]+$")
"""The folder of a model in the hub's cache; "owner--name" is the id."""
_EXTENT = re.compile(r"\d+ frames of \d+x\d+")
LEVERS = ("cache", "quantize", "compile", "decoder", "guidance_cache")
"""Levers that a request has fields for, which no other part of this layer carries out."""


def request_preset(preset: Preset | str | Path | None) -> Preset | None:
    """The preset that is asked for; None for none.

    Args:
        preset: a `Preset`, a file, the folder of a `tune`, or the name of one that comes with the package.

    Raises:
        BadInput: it cannot be read or is unknown.
    """
    from ...pipelines.presets import Preset, PresetError, load_preset

    if preset is None or isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str | os.PathLike):
        fix = "Preset.from_dict makes one of names and values." if isinstance(preset, Mapping) else ""
        problem = "it must be a Preset, a file, or the name of one that comes with the package"
        raise BadInput("preset", problem, fix, value=repr(preset))
    try:
        return load_preset(preset)
    except PresetError as error:
        raise BadInput("preset", f"cannot be used: {str(error).rstrip('.')}") from error


def with_levers(
    preset: Preset | None,
    cache: Cache | str | None = None,
    quantize: Quantize | str | None = None,
    decoder: str | Path | None = None,
    guidance_cache: GuidanceCache | int | None = None,
    compile: Compile | str | bool | None = None,
) -> Preset | None:
    """A preset with the levers of a request (`LEVERS`) in the place of its own; one of these alone without it.

    Args:
        preset: of `request_preset`.
        cache: instead of its own: a `Cache`, or "NAME" or "NAME=THRESHOLD"; "none" for none.
        quantize: instead of its own: a `Quantize`, or its kind; "none" for none.
        decoder: instead of its own: a tiny one, see `Preset`; "none" for none.
        guidance_cache: instead of its own: a `GuidanceCache`, or its `every`; 0 for none.
        compile: instead of its own: true, a mode of `torch.compile`, or a `Compile`; false for none.

    Returns:
        None where there is neither.

    Raises:
        BadInput: what is unknown or out of its bounds.
    """
    if all(each is None for each in (preset, cache, quantize, decoder, guidance_cache, compile)):
        return None
    from ...pipelines.presets import Preset

    chosen = Preset(name="") if preset is None else preset
    with refusals():
        if cache is not None:
            chosen = chosen.replace(cache=_cache(cache))
        if quantize is not None:
            chosen = chosen.replace(quantize=_quantize(quantize))
        if decoder is not None:
            chosen = chosen.replace(decoder=None if decoder == "none" else str(decoder))
        if guidance_cache is not None:
            chosen = chosen.replace(guidance_cache=guidance_cache or None)
        if compile is not None:
            chosen = chosen.replace(compile=compile)
    return chosen


def _cache(given: Cache | str) -> Cache | None:
    from ...pipelines.presets import Cache

    if not isinstance(given, str):
        return given
    name, equals, threshold = given.partition("=")
    if name == "none" and not equals:
        return None
    try:
        return Cache(name, float(threshold) if equals else None)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise BadInput("cache", "what follows = must be its threshold, a number", value=given) from None


def _quantize(given: Quantize | str) -> Quantize | None:
    from ...pipelines.presets import Quantize

    if not isinstance(given, str):
        return given
    return None if given == "none" else Quantize(given)


def refused(error: PresetError) -> BadInput:
    """What is wrong with a lever, by the field of the request that has it."""
    lever = error.lever.partition(".")[0]
    if lever in LEVERS:
        problem = f"{error.value}: {error.problem}" if error.value != "" else error.problem
        return BadInput(lever, f"cannot be used: {problem}", error.fix)
    return BadInput("preset", f"cannot be used: {str(error).rstrip('.')}")


def levers_alone(rest: Preset) -> str:
    """A name for dense with what a request has beside a method, which can be part of a file's name."""
    fields = (*LEVERS, "scheduler")
    return "-".join([DENSE, *(name for name in fields if getattr(rest, name) is not None)])


def beside(preset: Preset) -> Preset | None:
    """What of a preset no other part of this layer carries out; None for nothing."""
    from ...pipelines.presets import Preset

    rest = Preset(
        name=preset.name,
        family=preset.family,
        transformer=preset.transformer,
        model=preset.model,
        cache=preset.cache,
        guidance_cache=preset.guidance_cache,
        quantize=preset.quantize,
        compile=preset.compile,
        scheduler=preset.scheduler,
        decoder=preset.decoder,
    )
    return rest if rest.levers() else None


def measured_note(preset: Preset, settings: Settings, dtype: torch.dtype, device: torch.device) -> str:
    """What to say of a preset that was measured with something else than what runs, all of it; "" for the same.

    Args:
        preset: of which `measured` tells it, as `tune` writes it. settings: checked.
        dtype, device: of the run.
    """
    from ..machine import environment

    measured = preset.measured
    here: dict[str, tuple[object, object]] = {}  # what it was measured with, and what runs
    if not measured:
        return ""
    size = str(measured.get("size", "")).partition(",")[0]
    if _EXTENT.fullmatch(size):
        here["videos of"] = size, settings.extent
        # What has a size is of `tune`, which leaves out a negative prompt where there was none.
        here["negative prompt"] = measured.get("negative_prompt", ""), settings.negative_prompt or ""
    if preset.num_inference_steps is not None:
        here["steps"] = preset.num_inference_steps, settings.steps
    if "guidance_scale" in measured:
        here["guidance scale"] = measured["guidance_scale"], settings.guidance_scale
    if "dtype" in measured:
        here["dtype"] = measured["dtype"], str(dtype).removeprefix("torch.")
    if "machine" in measured or "torch" in measured:
        told = environment(device)
        # Of a CPU without the number of threads: what runs beside a video changes that, and it is the same machine.
        machine, own = (str(one).partition(", torch uses ")[0] for one in (measured.get("machine", ""), told["CPU"]))
        here["machine"] = machine, told.get("GPU", own)
        here["torch"] = measured.get("torch"), told["torch"]
    others = [
        f"{name} {_plain(was)} (here {_plain(is_)})" for name, (was, is_) in here.items() if was not in (None, is_)
    ]
    if not others:
        return ""
    return (
        f"The preset {preset.name} was measured with {', '.join(others)}: its gain and its distance from dense may be "
        "others."
    )


def _plain(value: object) -> str:
    text = "none" if value in ("", None) else f"{value:g}" if isinstance(value, float) else str(value)
    return shortened(text, 80)


def other_model_note(preset: Preset, facts: ModelFacts) -> str:
    """What to say of a preset that was measured with another model than the one that runs; else "".

    Args:
        facts: of the model, see `guidance.placed`; of a loaded pipeline that does not know where it is from, nothing is
            said.
    """
    has_ratios = preset.cache is not None and "mag_ratios" in preset.cache.settings
    unknown = not preset.model or facts.location == facts.pipeline_class
    if unknown or not (preset.measured or has_ratios):
        return ""
    if _location(preset.model) in (_location(facts.name), _location(facts.location)):
        return ""
    what = "has ratios for MagCache that were measured" if has_ratios else "was measured"
    told = f"The preset {preset.name} {what} with {preset.model}; with {facts.name}, its gain and its distance from "
    return told + "dense may be others."


def _location(model: str) -> str:
    """Where a model is, whole, so that two can be told apart; its name where it is not here, or in the hub's cache."""
    from ...pipelines.presets.files import whole_model

    try:
        place = whole_model(locate(model))
    except BadInput:
        place = whole_model(model)
    in_cache = _SNAPSHOT.search(Path(place).as_posix())
    return place if in_cache is None else in_cache[1].replace("--", "/", 1)


def check_beside(
    preset: Preset,
    facts: ModelFacts,
    settings: Settings,
    offload: bool | str = False,
    device: torch.device | None = None,
) -> None:
    """Raise BadInput for a preset of another model, and for a library that is missing, before weights are read.

    Args:
        preset: of the request.
        facts, settings: of the model and the request, checked.
        offload: see `pipelines.loading.load_pipeline`.
        device: where it will run, where that is known.
    """
    from ...pipelines.acceleration.families import family_of
    from ...pipelines.presets.checks import check_source, differences, scheduler_class
    from ...pipelines.presets.packages import check_packages

    known = family_of(facts.pipeline_class)
    family = known.name if known else ""
    if preset.family and preset.family != family:
        problem = f"{preset.name} is for {preset.family}, and {facts.name} is "
        problem += f"of {family}" if family else f"a {facts.pipeline_class}, of no family that is known"
        raise BadInput("preset", f"cannot be used: {problem}", f"Give another {mention('model')}, or another preset.")
    if facts.transformer and (differing := differences(preset.transformer, facts.transformer)):
        problem = f"cannot be used: {preset.name} is for another model: {'; '.join(differing)}"
        raise BadInput("preset", problem, f"Give another {mention('model')}, or another preset.")
    if preset.quantize is not None and (why := unquantised(offload)):
        problem = f"cannot be had with {mention('quantize')} block by block: {why}"
        raise BadInput("offload", problem, "Offload whole parts: in 8 bits a transformer takes half.")
    if preset.compile is not None and (why := uncompiled(offload, device)):
        raise BadInput("compile", f"cannot be used: {why}", f"Leave {mention('compile')} out.")
    with refusals():
        check_packages(preset)
        if preset.scheduler is not None:
            scheduler_class(preset.scheduler)
        check_source(preset.decoder, facts.location, facts.name)
    if preset.guidance_free and settings.guidance_scale is not None and settings.guidance_scale <= 1:
        raise BadInput("guidance_scale", "the preset puts guidance into one pass, and 1 is none", "Raise it.", value=1)


def check_guidance_cache(preset: Preset, settings: Settings, one_pass: bool) -> None:
    """Raise BadInput for a guidance cache where a request has no second passes, or all of them have to be made.

    Args:
        preset: of the request. settings: of it, checked. one_pass: it has guidance in one pass.
    """
    from ...pipelines.presets import Preset

    scale = settings.guidance_scale
    with refusals():
        Preset(
            guidance_cache=preset.guidance_cache,
            guidance_free=("own",) if one_pass else (),
            num_inference_steps=settings.steps,
            guidance_scale=None if scale is None else max(1.0, scale),
        )


def check_scheduler(preset: Preset, adapters: Sequence[GuidanceFreeAdapter]) -> None:
    """Raise BadInput for a preset with a scheduler beside adapters for few steps, which bring one."""
    from ...pipelines.presets.checks import check_few_steps

    with refusals():  # the steps of the request are looked at where adapters are, see `guidance.check_guidance`
        check_few_steps(preset.replace(num_inference_steps=None), adapters)


def unquantised(offload: bool | str) -> str | None:
    """Why layers cannot be in 8 bits when a model is offloaded in this way; None where they can."""
    from ...pipelines.loading import BLOCKS

    return "it moves the weights that it found" if offload == BLOCKS else None


def uncompiled(offload: bool | str, device: torch.device | None) -> str | None:
    """Why blocks cannot be compiled on a device when a model is offloaded in this way; None where they can."""
    from ...attention import code_generator
    from ...pipelines.loading import BLOCKS

    if offload == BLOCKS:
        return "offloading by blocks puts hooks into them that would break their graphs"
    missing = None if device is None else code_generator.missing(device)
    return missing and f"torch's compiler {missing}"


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What a pipeline refuses of a preset as bad input."""
    from ...pipelines.presets import PresetError

    try:
        yield
    except PresetError as error:
        raise refused(error) from error
