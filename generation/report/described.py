"""What a job is, for a reader: the settings on a page and among its numbers, and the call that makes it again."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, worded
from ..models.schedulers import scheduler_words, stated, stated_in_files
from ..requests.settings import INPUTS

if TYPE_CHECKING:
    from ..job import Job

IN_MEMORY = "given in memory"
_PLAIN = (str, bool, type(None))


def described(job: Job, name: Callable[[str], str] = str) -> dict[str, str]:
    """Title -> text; fields are named by `name`."""
    from ...pipelines.loading import usual_autoencoder_dtype

    settings = job.settings
    loras = {"LoRAs": ", ".join(f"{lora.path.name} ({lora.weight:g})" for lora in job.loras)} if job.loras else {}
    of_vae = usual_autoencoder_dtype(job.facts.makes_any_size, job.dtype)
    if job.facts.row.follows:
        of_vae = job.dtype
    if job.pipe is not None:
        of_vae = job.pipe.vae.dtype
    guidance, options = settings.guidance_scale, settings.pipeline_options
    free = {"guidance in one pass": ", ".join(a.path.name for a in job.guidance_free)} if job.guidance_free else {}
    return {
        "model": f"{job.facts.name} ({job.facts.pipeline_class})",
        **loras,
        **free,
        **_scheduler(job),
        **({"SLA": ", ".join(a.path.name for a in job.sla)} if job.sla else {}),
        **({} if job.riflex is None else {"rotary embedding": f"RIFLEx from {job.riflex.frames} latent frames"}),
        **({} if job.beside is None else job.beside.levers()),
        "methods": worded(f"{', '.join(job.methods)}: {job.why}", name),
        "size": settings.extent,
        **_inputs(job),
        "negative prompt": settings.negative_prompt or "none",
        "steps": str(settings.steps),
        "guidance scale": "none" if guidance is None else f"{guidance:g}",
        "seed": str(settings.seed),
        **({"pipeline options": ", ".join(f"{k}={v!r}" for k, v in options.items())} if options else {}),
        "backend": job.backend,
        **({"processes": job.sharing.in_words()} if job.process.count > 1 else {}),
        **({} if job.precision is None else {"precision": f"{job.precision} in sparse attention"}),
        "dtype": f"{job.dtype}, autoencoder {of_vae}".replace("torch.", ""),
    }


def _scheduler(job: Job) -> dict[str, str]:
    """That of the model; none where an adapter for few steps brings one, or nothing tells it."""
    if any(adapter.sigmas for adapter in job.guidance_free):
        return {}
    try:
        told = stated_in_files(job.facts.location) if job.pipe is None else stated(job.pipe.scheduler)
    except BadInput:
        return {}
    return {} if told is None else {"scheduler": scheduler_words(told)}


def _inputs(job: Job) -> dict[str, str]:
    """What the video starts from, and how far it goes from it."""
    given = {field: job.inputs.get(field) for field in INPUTS if field in job.settings.given}
    told = {
        field.replace("_", " "): ", ".join(map(str, files)) if files else IN_MEMORY for field, files in given.items()
    }
    strength = job.settings.strength
    return told if strength is None else {**told, "strength": f"{strength:g}"}


def call_text(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """A call of a function of the root as Python writes it, without what is left at its default.

    What no line of Python makes, such as a loaded pipeline or an array, is named by its class: `<WanPipeline>`.

    Args:
        given: value of each of its parameters.
    """
    told = []
    for name, parameter in inspect.signature(function).parameters.items():
        if given[name] is not parameter.default:
            keyword = parameter.kind is parameter.KEYWORD_ONLY
            told.append(f"{name}={_text(given[name])}" if keyword else _text(given[name]))
    return f"vidaccel.{function.__name__}({', '.join(told)})"


def _text(value: Any) -> str:
    import torch

    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Real):  # numpy's among them
        number = int(value) if isinstance(value, Integral) else float(value)
        return repr(number) if math.isfinite(number) else f"float({str(number)!r})"
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, torch.device):
        return repr(str(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]" if all(map(_is_short, value)) else f"<{len(value)} in a list>"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(key)}: {_text(each)}' for key, each in value.items())}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init)
        set_here = [f"{field.name}={_text(own)}" for field, own in fields if not _is_default(field, own)]
        return f"{type(value).__name__}({', '.join(set_here)})"
    return f"<{type(value).__name__}>"


def _is_short(value: Any) -> bool:
    """Not one of the frames of a video."""
    if isinstance(value, list | tuple):
        return all(map(_is_short, value))
    return isinstance(value, (*_PLAIN, Real, os.PathLike)) or dataclasses.is_dataclass(value)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return type(value) is type(default) and bool(value == default)
