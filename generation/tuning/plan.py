"""What is asked of `tune`, checked whole before weights are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.nearest_name import nearest
from ...pipelines.presets.files import TUNED
from ..errors import BadInput, mention
from ..job import Job, prepare
from ..levers.presets import uncompiled, unquantised
from ..outputs import check_writable
from ..report.comparison import check_comparable
from ..requests.prompts import prompts_with_seeds
from ..requests.settings import Settings
from ..requests.sparse import Sparse
from ..requests.values import count, file_name, places
from .adapters import AdapterLever, adapter_levers
from .budget import Budget
from .identity import identity_of
from .journal import FILE, Journal
from .space import CACHES, EFFORTS, LEVERS, METHODS, LayersLever, guidance_levers, layers_levers, quantize_levers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ...pipelines.guidance_cache.settings import GuidanceCache
    from ...pipelines.presets import Compile, Quantize
    from ..models.facts import ModelFacts

_NO_ERROR = "an adapter makes other passes than the dense run, so its steps have no error against it"
PRESET = TUNED
PAGE = "tune.html"
DATA = "tune.json"
"""Files in the folder, beside the journal."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A request that was checked whole.

    Args:
        job: the dense video of the first prompt.
        budget: to keep within.
        prompts, seeds: of the videos.
        methods, caches: names of what is tried.
        precisions: of the product of queries and keys.
        layers: in 8 bits, or compiled.
        adapters: for guidance in one pass, or few steps.
        guidance: leaves second passes out.
        effort: of `EFFORTS`.
        most: candidates of which whole videos are made.
        dropped: lever -> why it is not tried.
        out: folder of the journal, the page and the preset.
    """

    job: Job
    budget: Budget
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    caches: tuple[str, ...]
    precisions: tuple[str, ...]
    layers: tuple[LayersLever, ...]
    adapters: tuple[AdapterLever, ...]
    guidance: tuple[GuidanceCache, ...]
    effort: str
    most: int
    dropped: Mapping[str, str]
    out: Path


def planned(
    model: str | Path | DiffusionPipeline,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    *,
    out: str | Path,
    budget: Budget,
    levers: Sequence[str],
    methods: Sequence[str],
    caches: Sequence[str],
    effort: str,
    confirm: int,
    settings: Mapping[str, Any],
    placing: Mapping[str, Any],
    adapters: Sequence[str | Path] = (),
    facts: ModelFacts | None = None,
) -> Plan:
    """Check a request, before weights are read; see `tune`.

    Args:
        settings: of `Settings`. placing: of `prepare`, what `tune` has of it.
        facts: of a loaded pipeline, where its loader knows more than it does itself.
    """
    texts, numbers = prompts_with_seeds(prompts, seeds)
    adapters = places("adapters", adapters)
    levers, methods, caches = ([each] if isinstance(each, str) else each for each in (levers, methods, caches))
    for field, names, known in (("levers", levers, LEVERS), ("caches", caches, CACHES), ("effort", [effort], EFFORTS)):
        for name in names:
            if name not in known:
                raise BadInput(field, f"there is none of that name{nearest(name, known)}", value=name)
    confirm = count("confirm", confirm)
    wanted = Settings(texts[0], **settings)
    folder = file_name("out", out)
    if folder.exists() and not folder.is_dir():
        raise BadInput("out", "it is a file", "Give a folder; it is made where it is not there.", value=folder)
    check_writable("out", folder / PAGE, value=folder)
    _check_own(folder)
    for method in methods:
        check_method(method)
    job = prepare(str(model) if isinstance(model, Path) else model, wanted, Sparse(methods=("dense",)), **placing)
    job = job if facts is None else replace(job, facts=facts)
    if trained := job.facts.trained_for:
        problem = (
            f"it was trained for {trained}, and all that is measured here is compared with dense attention, for which "
            "it was not trained"
        )
        fix = "Run it as it was trained, with caches or 8 bits of a preset where they are wanted."
        raise BadInput("model", problem, fix, value=job.facts.name)
    size = job.settings
    check_comparable(size.height, size.width)
    if size.steps < 2:
        raise BadInput("steps", "a run of one step has nothing to tune", "Give more.", value=size.steps)
    asked = {
        "methods": ("sparse", methods and tuple(methods) != METHODS),
        "caches": ("cache", caches and tuple(caches) != tuple(CACHES)),
        "adapters": ("adapter", adapters),
    }
    for field, (lever, given) in asked.items():
        if given and lever not in levers:
            problem = f"given without the lever {lever}, which tries them"
            raise BadInput(field, problem, f"Add it to {mention('levers')}.")
    if adapters and budget.max_error is not None:
        adapter_levers(job, adapters)  # what is wrong with them goes before
        fix = f"Give {mention('min_psnr')} or {mention('max_time_ratio')}, or leave {mention('adapters')} out."
        raise BadInput("max_error", f"is no budget for {mention('adapters')}: {_NO_ERROR}", fix)
    chosen, dropped = _available(job, levers, methods, caches)
    compiled = _compile(job, levers, dropped)
    chosen["layers"] = tuple(layers_levers(_quantize(job, levers, effort, dropped), compiled))
    chosen["adapters"] = _adapters(job, levers, adapters, budget, dropped)
    chosen["guidance"] = _guidance(job, levers, effort, dropped)
    if not any(chosen[name] for name in ("methods", "caches", "layers", "adapters", "guidance")):
        why = "; ".join(f"{name}: {reason}" for name, reason in dropped.items())
        raise BadInput(
            "levers", f"leaves nothing to try{f' ({why})' if why else ''}", f"Give others of {mention('levers')}."
        )
    return Plan(job, budget, texts, numbers, **chosen, effort=effort, most=confirm, dropped=dropped, out=folder)


def _check_own(folder: Path) -> None:
    """Raise BadInput for a folder with files of the names that are written, and replaced, where no search made them."""
    for name in (PRESET, PAGE, DATA):
        if (folder / name).exists() and not (folder / FILE).exists():
            problem = f"it has a {name} that no search has made, which would be replaced"
            raise BadInput("out", problem, "Give another folder.", value=folder)


def check_method(name: str, field: str = "methods") -> None:
    """Raise BadInput for a method that cannot be measured without training."""
    from ...attention import METHODS as KNOWN

    known = [each for each, method in KNOWN.items() if each != "random" and not method().needs_weights]
    if name in known:
        return
    if name not in KNOWN:
        raise BadInput(field, f"there is none of that name{nearest(name, known)}", value=name)
    problem = f"it is none of the methods that can be measured without training: {', '.join(known)}"
    raise BadInput(field, problem, value=name)


def _available(
    job: Job, levers: Sequence[str], methods: Sequence[str], caches: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What of a request can be tried here; and the rest, with why."""
    from ...attention.backends import refusal, special_refusal
    from ...pipelines.presets import Cache, Preset, PresetError
    from ...pipelines.presets.packages import check_packages

    dropped: dict[str, str] = {}
    precisions: tuple[str, ...] = ()
    own_methods, own_caches = tuple(methods), []
    if "sparse" not in levers:
        own_methods = ()
    elif reason := job.facts.only_dense or refusal("auto", job.device):
        own_methods, dropped["sparse"] = (), reason
    for name in caches if "cache" in levers else ():
        settings = {"mag_ratios": [1.0]} if name == "magcache" else {}
        try:
            check_packages(Preset(cache=Cache(name, settings=settings)))
            own_caches.append(name)
        except PresetError as error:
            dropped[name] = f"{error.problem}. {error.fix}".rstrip()
    if "precision" in levers and own_methods:
        if (reason := special_refusal("auto", job.device, "int8", dtype=job.dtype)) is None:
            precisions = ("int8",)
        else:
            dropped["precision"] = reason
    return {"methods": own_methods, "caches": tuple(own_caches), "precisions": precisions}, dropped


def _quantize(job: Job, levers: Sequence[str], effort: str, dropped: dict[str, str]) -> tuple[Quantize, ...]:
    """The layers in 8 bits that are tried; why none, as where torchao is missing. Whether they pay is measured."""
    from ...pipelines.presets import Preset, PresetError
    from ...pipelines.presets.packages import check_packages

    if "quantize" not in levers:
        return ()
    if why := unquantised(job.offload):
        dropped["quantize"] = f"not when offloading by blocks: {why}"
        return ()
    found = tuple(quantize_levers(effort))
    try:
        check_packages(Preset(quantize=found[0]))
    except PresetError as error:
        dropped["quantize"] = f"{error.problem}. {error.fix}"
        return ()
    return found


def _compile(job: Job, levers: Sequence[str], dropped: dict[str, str]) -> Compile | None:
    """How the blocks are compiled; why they are not, as where there is no compiler. Whether it pays is measured."""
    from ...pipelines.presets import Compile

    if "compile" not in levers:
        return None
    if why := uncompiled(job.offload, job.device):
        dropped["compile"] = why
        return None
    return Compile()


def _adapters(
    job: Job, levers: Sequence[str], given: Sequence[str | Path], budget: Budget, dropped: dict[str, str]
) -> tuple[AdapterLever, ...]:
    """The adapters that are tried; of those beside the model that are not, why."""
    if "adapter" not in levers:
        return ()
    found, refused = adapter_levers(job, given)
    dropped.update(refused)
    if budget.max_error is not None:
        dropped.update({adapter.label: _NO_ERROR for adapter in found})
        return ()
    return found


def _guidance(job: Job, levers: Sequence[str], effort: str, dropped: dict[str, str]) -> tuple[GuidanceCache, ...]:
    """How many second passes are left out; why none. What only a loaded model tells is refused when it is measured."""
    if "guidance" not in levers:
        return ()
    found = tuple(guidance_levers(effort))
    if why := _no_second_passes(job, found[0]):
        dropped["guidance"] = why
        return ()
    return found


def _no_second_passes(job: Job, settings: GuidanceCache) -> str | None:
    """Why there is none to leave out; None where there may be."""
    from ...pipelines.acceleration.families import family_of
    from ...pipelines.guidance_branches import check_branches
    from ...pipelines.guidance_cache.handle import check_guidance_cache
    from ...pipelines.presets import Preset, PresetError

    scale, kind = job.settings.guidance_scale, job.facts.pipeline_class
    if scale is None or scale <= 1:
        stated = "there is none" if scale is None else f"it is {scale:g}"
        return f"no second pass to leave out: guidance_scale must be above 1, and {stated}"
    try:
        Preset(guidance_cache=settings, num_inference_steps=job.settings.steps)
        if (family := family_of(kind)) is not None:
            check_branches(kind, family)
        if job.pipe is not None:
            check_guidance_cache(job.pipe)
    except PresetError as error:
        return error.problem
    except (TypeError, RuntimeError) as error:
        return str(error).rstrip(".")
    return None


def requested(plan: Plan) -> str:
    """What a search is for and tries, the same for the same request: a hash."""
    told = [str(plan.budget), plan.effort, plan.methods, plan.caches, plan.precisions, plan.layers, plan.guidance]
    told += [[adapter.digest for adapter in plan.adapters]]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def journal_of(plan: Plan) -> Journal:
    """The journal in a plan's folder; BadInput for one of something else."""
    return Journal(plan.out, identity_of(plan.job, plan.prompts, plan.seeds))
