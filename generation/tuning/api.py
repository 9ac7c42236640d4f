"""`vidaccel.tune`: the fastest preset within a budget, on the user's model, machine, size and prompts."""

from __future__ import annotations

import contextlib
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipelines.break_even import BreakEven, Key
from ..alone import alone
from ..errors import BadInput, mention
from ..job import Job
from ..levers.methods import DEFAULT_METHOD
from ..machine import check_runs, choose_device, choose_dtype, environment
from ..models.inspected import inspect_model
from ..models.schedulers import changed_scheduler, scheduler_words, stated
from ..models.single_file import whole_model
from ..requests.prompts import in_words, unknown_note
from ..requests.values import check_switches, count, number
from ..run import load
from .bench import Bench, Done
from .break_even import find_break_even, timer
from .budget import Budget
from .journal import Journal
from .plan import PAGE, PRESET, Plan, check_method, journal_of, planned, requested
from .progress import counted
from .result import FOUND, Tuned
from .search import Measures, Search
from .space import CACHES, LEVERS, METHODS, cache_levers, sparse_levers
from .store import check_cache, store
from .trajectory import Clock

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ...pipelines.presets import Preset

REMOVED = (
    f"The {PRESET} of an earlier call was removed, since it is no answer to this one; that call, made again, writes it "
    "from what is kept."
)
Shown = contextlib.AbstractContextManager[tuple[Done, Callable[[int], None]]]


def tune(
    model: str | Path | DiffusionPipeline,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    out: str | Path,
    max_error: float | None = None,
    min_psnr: float | None = None,
    max_time_ratio: float | None = None,
    levers: Sequence[str] = LEVERS,
    methods: Sequence[str] = METHODS,
    caches: Sequence[str] = CACHES,
    adapters: Sequence[str | Path] = (),
    effort: str = "normal",
    confirm: int = 6,
    negative_prompt: str = "",
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    offload: bool | str = False,
    tiling: bool = False,
    components: str | Path | None = None,
    progress: bool = True,
    clock: Clock = time.perf_counter,
) -> Tuned:
    """Find the fastest preset within a budget, or with `max_time_ratio` the one nearest to dense.

    First single steps of each lever are measured on the inputs of the dense run (error of the output, error of
    attention in each layer, seconds). From these, all combinations of levers and of steps and layers that stay dense
    are predicted. Then whole videos are made with the few that promise most, each choice with what the videos before
    taught. Everything is in a journal in `out`, so that a second call goes on where the first was interrupted, and
    another budget begins with what is known.

    Args:
        model: see `vidaccel.generate`.
        prompts: one video each; four to eight are enough to choose by.
        seeds: of their noise: one each, or the first of as many.
        out: a folder, made where it is not there: the journal, the page `tune.html` with its numbers, `preset.yaml`.
        max_error, min_psnr, max_time_ratio: see `Budget`; at least one.
        levers: of "sparse", "cache", "precision" (8-bit products of attention, where a kernel for them runs),
            "quantize" (linear layers in 8 bits by torchao, where they turn out to be faster), "compile" (the
            transformer's blocks by torch, where a compiler for the device is there), "adapter" (guidance in
            one pass, or few steps; with `min_psnr` or `max_time_ratio`) and "guidance" (second passes of guidance made
            in some steps only, see `GuidanceCache`).
        methods: of sparse attention.
        caches: over steps. Those whose package is missing are left out, with a word.
        adapters: files or folders of guidance-free adapters, of the recipes `gft` and `consistency`. Without any, those
            beside the model's weights that were trained on it.
        effort: "quick", "normal" or "thorough": how finely densities and thresholds are tried.
        confirm: candidates of which whole videos are made, at the most, besides each adapter alone.
        negative_prompt, frames, height, width, steps, guidance_scale: see `vidaccel.generate`.
        device, dtype, offload, tiling, components: see `vidaccel.generate`.
        progress: show a bar.
        clock: of all times.

    Returns:
        What was chosen and everything that was tried; its `outcome` says whether there is a preset.

    Raises:
        BadInput: a request that cannot be met, or a folder that holds measurements of something else, or in which
            another call measures.
        GenerationError: the model made NaN or infinite values.
    """
    check_switches(tiling=tiling, progress=progress)
    plan = planned(
        model,
        prompts,
        seeds,
        out=out,
        budget=Budget(max_error, min_psnr, max_time_ratio),
        levers=levers,
        methods=methods,
        caches=caches,
        effort=effort,
        confirm=confirm,
        settings={
            "negative_prompt": negative_prompt,
            "frames": frames,
            "height": height,
            "width": width,
            "steps": steps,
            "guidance_scale": guidance_scale,
        },
        placing={"device": device, "dtype": dtype, "offload": offload, "tiling": tiling, "components": components},
        adapters=adapters,
    )
    return carried_out(plan, progress=progress, clock=clock)


def measured_break_even(
    model: str | Path | None = None,
    *,
    heads: int | None = None,
    head_dim: int | None = None,
    method: str = DEFAULT_METHOD,
    seconds: float = 60.0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    components: str | Path | None = None,
) -> tuple[BreakEven, Key, Path]:
    """Measure from how many tokens sparse attention pays for the heads of a model, and keep it for this machine.

    Args:
        model: see `vidaccel.generate`; its weights are not read. None for the heads that are given.
        heads, head_dim: of self-attention, in place of a model's: of one that is no pipeline of diffusers.
        method: of sparse attention, as it is by default.
        seconds: about as long as it may take.
        device, dtype, components: see `vidaccel.generate`.

    Returns:
        What was found, what it is of, and the file that it is kept in.

    Raises:
        BadInput: a request that cannot be met.
    """
    seconds = number("seconds", seconds)
    if not seconds > 0:
        raise BadInput("seconds", "it must be above 0", value=seconds)
    check_method(method, "method")
    own = {"heads": heads, "head_dim": head_dim}
    if model is None and None in own.values():
        missing = next(name for name, value in own.items() if value is None)
        raise BadInput(
            missing, "is needed", f"Give {mention('heads')} and {mention('head_dim')}, or {mention('model')}."
        )
    if model is not None and any(value is not None for value in own.values()):
        raise BadInput("model", f"has heads of its own: leave it out, or {mention('heads')} and {mention('head_dim')}")
    if model is None:
        own = {field: count(field, value) for field, value in own.items()}
    if model is None:
        whole_model("", components)  # refuses components of no file
    place = choose_device(device, False)
    chosen = choose_dtype(dtype, place, str(model or ""))
    shape = (own["heads"], own["head_dim"]) if model is None else _heads(str(model), components)
    check_runs("auto", place, sparse=True)
    key = Key.here(*shape, place, chosen, method)
    check_cache(key)
    found = find_break_even(timer(key.heads, key.head_dim, place, chosen, method), seconds=seconds)
    return found, key, store(key, found)


def _heads(model: str, components: str | Path | None) -> tuple[int, int]:
    facts = inspect_model(whole_model(model, components))
    if facts.only_dense:
        raise BadInput("model", facts.only_dense, value=model)
    return facts.row.heads(facts.transformer)


def carried_out(
    plan: Plan, *, progress: bool = True, clock: Clock = time.perf_counter, shown: Shown | None = None
) -> Tuned:
    """Load the model, measure, choose, and write the page and the preset.

    Args:
        plan: of `planned`.
        progress, clock: see `tune`.
        shown: in place of the bar: gives what is told of each measurement, and of how many more there may be.

    Raises:
        BadInput: another call measures in the folder, or it holds measurements of something else.
    """
    from .page import write_page

    job, folder = plan.job, plan.out
    with alone(folder):
        journal = journal_of(plan)
        if shown is None:
            shown = counted() if progress else contextlib.nullcontext((lambda *_: None, lambda _: None))
        with shown as (tell, expect):
            pipe = job.pipe or load(job.facts, job.dtype, job.device, offload=job.offload, tiling=job.tiling)
            made = _searched(plan, pipe, journal, tell, expect, clock)
        preset_file = folder / PRESET
        if made.preset is None:
            if preset_file.exists():  # of another budget: it must not pass for an answer to this one
                preset_file.unlink()
                made = replace(made, notes=(*made.notes, REMOVED))
        else:
            from ...pipelines.presets import save_preset

            save_preset(made.preset, preset_file)
        write_page(made, folder / PAGE)
    return made


def bench_of(plan: Plan, pipe: Any, journal: Journal, tell: Done, clock: Clock) -> Bench:
    """What measures for a plan."""
    job = plan.job
    base = None if job.pipe is not None else job.facts.location
    return Bench(pipe, job.settings, plan.prompts, plan.seeds, journal, plan.out, base=base, tell=tell, clock=clock)


def _searched(plan: Plan, pipe: Any, journal: Journal, tell: Done, expect: Any, clock: Clock) -> Tuned:
    from ...pipelines.acceleration.families import find_transformers
    from ...pipelines.guidance_branches import apart_from_caches

    job = plan.job
    bench = bench_of(plan, pipe, journal, tell, clock)
    parts = find_transformers(pipe)
    layers = max(len(family.modules(transformer)) for transformer, family in parts.values())
    dense = bench.dense(layers)
    dropped = dict(plan.dropped)
    sparse, refused = sparse_levers(plan.methods, job.layout, job.device, plan.effort, plan.precisions)
    dropped |= refused
    ratios = None
    if "magcache" in plan.caches:
        try:
            ratios = bench.ratios()
        except BadInput as error:
            dropped["magcache"] = error.problem
    asked = f"asked {requested(plan)}"
    measures = Measures(
        bench.probe,
        bench.confirm,
        lambda adapter: bench.run(adapter, layers),
        bench.gains,
        bench.knows,
        lambda count: journal.put(asked, count),
    )
    caches = cache_levers(plan.caches, plan.effort, ratios)
    apart = apart_from_caches(parts, "a cache over steps") if caches and plan.guidance else None
    if apart is not None:
        dropped["guidance with a cache"] = apart
    search = Search(plan.budget, dense, measures, plan.most, apart is not None, journal.get(asked) or 0, plan=expect)
    outcome, chosen, tried = search.run(sparse, caches, plan.layers, plan.adapters, plan.guidance)
    unknown = unknown_note(job.facts.name, *plan.prompts, job.settings.negative_prompt or "")
    notes = [*filter(None, [unknown]), *bench.cut]
    if search.left_out:
        why = "and for each of them another of its kind is as fast and nearer, or dense is faster"
        notes.append(f"{search.left_out:,} more combinations were predicted, {why}.")
    if search.ran_out:
        few = f"{plan.most} candidate{'s' * (plan.most != 1)}"
        notes.append(f"Videos were made of {few}, the most that was asked for; another is promising.")
    size, loras = job.settings, _loras(parts)
    settings = {
        "model": f"{job.facts.name} ({job.facts.pipeline_class})",
        "size": f"{size.extent}, {job.layout.tokens:,} tokens",
        "steps": str(size.steps),
        "scheduler": scheduler_words(stated(pipe.scheduler)),
        **({"LoRAs": ", ".join(loras)} if loras else {}),
        "guidance scale": "none" if size.guidance_scale is None else f"{size.guidance_scale:g}",
        "budget": str(plan.budget),
        "negative prompt": size.negative_prompt or "none",
        "videos": in_words(plan.prompts, plan.seeds),
        "effort": plan.effort,
        "dtype": str(job.dtype).removeprefix("torch."),
    }
    made = Tuned(
        outcome,
        plan.budget,
        tried,
        statistics.median(bench.seconds),
        None,
        chosen,
        dropped,
        settings,
        environment(job.device),
        plan.prompts,
        tuple(notes),
    )
    return made if outcome != FOUND else _with_preset(made, job, plan.out, loras)


def _with_preset(made: Tuned, job: Job, folder: Path, loras: Sequence[str]) -> Tuned:
    own = made.chosen.confirmed
    measured = {
        "times_as_fast": round(statistics.median(made.gain), 3),
        "psnr_to_dense": round(own.mean_psnr, 2) if own.mean_psnr < 1e9 else "identical",
        **({} if own.error is None else {"error_a_step": round(own.error, 5)}),
        "prompts": len(made.prompts),
        **({} if job.settings.guidance_scale is None else {"guidance_scale": job.settings.guidance_scale}),
        **({"negative_prompt": job.settings.negative_prompt} if job.settings.negative_prompt else {}),
        "size": made.settings["size"],
        "dtype": made.settings["dtype"],
        "machine": made.environment.get("GPU", made.environment["CPU"]),
        "torch": made.environment["torch"],
    }
    from ...pipelines.presets import PresetError

    facts, scale = _facts_of(job), job.settings.guidance_scale
    # The model's own is what a call without one has, under whatever name the pipeline takes it.
    if made.chosen.candidate.adapter is not None or scale != job.facts.call_defaults().get("guidance_scale"):
        facts["guidance_scale"] = scale
    adapter, notes = made.chosen.candidate.adapter, list(made.notes)
    if job.pipe is not None and (adapter is None or adapter.steps is None):  # else it brings its own scheduler
        try:
            if (scheduler := changed_scheduler(job.pipe, job.facts.location)) is not None:
                facts["scheduler"] = scheduler
        except PresetError as error:
            notes.append(f"The preset cannot name the scheduler that was measured with, {error}")
    if loras:
        notes.append(
            f"The pipeline that was measured has LoRAs, which are not in the preset: {', '.join(loras)}. Give them "
            "beside it; without them, its gain and its distance from dense may be others."
        )
    preset = made.chosen.candidate.preset(**facts, measured=measured)
    return replace(made, preset=preset, command=_command(preset, job, folder, loras), notes=tuple(notes))


def _loras(parts: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Names of the adapters that are at work in the layers of transformers."""
    from ...pipelines.loras.kept_loras import tuner_layers

    names: dict[str, None] = {}
    for transformer, _family in parts.values():
        if not hasattr(transformer, "peft_config"):
            continue
        for layer in tuner_layers(transformer).values():
            if not layer.disable_adapters:
                names |= dict.fromkeys(name for name in layer.active_adapters if name in layer.lora_A)
    return list(names)


def _command(preset: Preset, job: Job, folder: Path, loras: Sequence[str]) -> str:
    """What makes a video like those that the preset was measured with, for a shell."""
    size = job.settings
    words: list[object] = [] if preset.model else ["--model", "..."]
    words += ["--preset", folder / PRESET]
    words += ["--lora", "..."] * len(loras)
    words += ["--frames", size.frames, "--height", size.height, "--width", size.width]
    words += ["--negative-prompt", size.negative_prompt] if size.negative_prompt else []
    return f'vidaccel generate "..." {shlex.join(map(str, words))}'


def _facts_of(job: Job) -> dict[str, Any]:
    """What a preset says of the model that it is for."""
    from ...pipelines.acceleration.families import family_of
    from ...pipelines.presets.files import whole_model

    of = family_of(job.facts.pipeline_class)
    family = of.name if of else ""
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")
    transformer = {name: job.facts.transformer[name] for name in names if name in job.facts.transformer}
    told = {"name": "tuned", "family": family, "transformer": transformer, "num_inference_steps": job.settings.steps}
    known = job.pipe is None or job.facts.name != job.facts.pipeline_class  # a loaded one may not know where it is from
    return told | ({"model": whole_model(job.facts.name)} if known else {})
