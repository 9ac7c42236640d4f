"""A request that was checked whole, before any weights are read: what will run, with what, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calls import as_class, check_untouched, dtype_of
from .errors import BadInput, mention, refuse_given
from .levers.adapter_places import model_note, taken_notes
from .levers.guidance import check_guidance, guidance_adapters, own_adapters, placed, suited
from .levers.length import (
    built_in_lora,
    check_bases,
    check_trained,
    chosen_riflex,
    trained_lengths,
)
from .levers.lora_fit import check_fits, trained_elsewhere, trained_otherwise
from .levers.loras import check_targets, lora_files
from .levers.methods import (
    DENSE,
    check_methods,
    check_sparse_only,
    choose_runs,
    expected_note,
    name_of,
    trained_note,
    whole_note,
)
from .levers.presets import (
    beside,
    check_beside,
    check_guidance_cache,
    check_scheduler,
    levers_alone,
    measured_note,
    other_model_note,
)
from .levers.run_methods import methods_of_runs
from .levers.sla import sla_adapters, trained_method
from .levers.vsa import trained_settings
from .machine import (
    check_formats,
    check_runs,
    choose_device,
    choose_dtype,
)
from .models.facts import ModelFacts
from .models.inspected import inspect_model, inspect_pipeline, variant
from .models.single_file import whole_model
from .processes import ALONE, NOTHING, Process, Sharing, check_count, share_out
from .report.comparison import check_comparable
from .requests.filled import Filled, filled, said_of_preset
from .requests.local_files import local_files
from .requests.prompts import unknown_note
from .requests.settings import INPUTS, Settings
from .requests.sparse import Sparse
from .tuning.store import limit_of

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..attention.layout import VideoLayout
    from ..attention.methods.base import Method
    from ..pipelines.acceleration.sla import SLAAdapter
    from ..pipelines.guidance_free.adapter_file import GuidanceFreeAdapter
    from ..pipelines.length.settings import Riflex
    from ..pipelines.length.trained import TrainedLength
    from ..pipelines.loras.files import LoraFile
    from ..pipelines.presets import Preset


@dataclass(frozen=True, eq=False)
class Job:
    """What `prepare` made of a request.

    Args:
        facts: of the model.
        settings: with the model's defaults.
        layout: the token grid of the video.
        methods: by name, in the order of the runs; None is dense. Several configs of one method have what differs in
            their names.
        why: why these methods; to be `worded`, as all texts here.
        compare: whether the first is the reference of a comparison.
        backend: a name, or "auto".
        device, dtype: where and in what the model runs.
        offload, tiling: see `pipelines.loading.load_pipeline`.
        density: what was asked for, None for the methods' own.
        inputs: field -> local files that are read for it.
        pipe: the pipeline, where it was given loaded.
        notes: what a user should know, in sentences.
        measure_error: see `accelerate`.
        loras: that are put into the pipeline once it is loaded.
        guidance_free: adapters with which guidance takes one pass a step; none for two.
        sla: adapters for the method "sla"; none where the weights themselves were trained.
        riflex: of the rotary embedding; None for the model's own.
        beside: what runs beside sparse attention, see `presets.beside`; not in the reference of a comparison.
        hint: where the choice went by a fixed length, how to measure that; for a terminal.
        precision: see `accelerate`.
        process: of those that make the video together, this one. sharing: what they share.
        of_preset: see `requests.filled.Filled`.
    """

    facts: ModelFacts
    settings: Settings
    layout: VideoLayout
    methods: Mapping[str, Method | None]
    why: str
    compare: bool
    backend: str
    device: torch.device
    dtype: torch.dtype
    offload: bool | str = False
    tiling: bool = False
    density: float | None = None
    inputs: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    pipe: DiffusionPipeline | None = None
    notes: tuple[str, ...] = ()
    measure_error: int = 0
    loras: tuple[LoraFile, ...] = ()
    guidance_free: tuple[GuidanceFreeAdapter, ...] = ()
    sla: tuple[SLAAdapter, ...] = ()
    riflex: Riflex | None = None
    beside: Preset | None = None
    hint: str = ""
    precision: str | None = None
    process: Process = ALONE
    sharing: Sharing = NOTHING
    of_preset: frozenset[str] = frozenset()

    @property
    def first(self) -> str:
        """The run whose video is the result: the first one, of a comparison the first after the reference."""
        return list(self.methods)[self.compare]

    @property
    def is_quantised_first(self) -> bool:
        """Whether layers are put into 8 bits before the model is on its device, which then needs no room for the whole
        weights: not where the reference of a comparison runs with them; offloaded, they are in main memory anyway."""
        in_8_bits = self.beside is not None and self.beside.quantize is not None
        return in_8_bits and self.pipe is None and not self.compare and not self.offload

    def files(self, out: Path) -> dict[str, Path]:
        """A file for the video of each run: `out` for the result, NAME.METHOD.mp4 beside it for the others."""
        return {n: out if n == self.first else out.with_name(f"{out.stem}.{n}.mp4") for n in self.methods}


def prepare(
    model: str | DiffusionPipeline,
    settings: Settings,
    sparse: Sparse,
    *,
    compare: bool = False,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    offload: bool | str = False,
    tiling: bool = False,
    lora: str | Path | LoraFile | Sequence[str | Path | LoraFile] | None = (),
    guidance_free: bool | str | Path | Sequence[str | Path] | None = (),
    sla: str | Path | Sequence[str | Path] | None = (),
    rope: str = "plain",
    components: str | Path | None = None,
    preset: Preset | None = None,
    levers: Mapping[str, Any] | None = None,
    process: Process = ALONE,
    share: str = "auto",
) -> Job:
    """Check a request against the model and the machine.

    Args:
        model: see `inspect_model`; a single file, see `components`; or a loaded pipeline, which stays where and as it
            is.
        settings, sparse: the request.
        compare: run dense from the same seed first.
        device, dtype: a name, or "auto".
        offload, tiling: see `pipelines.loading.load_pipeline`.
        lora: see `loras.lora_files`; of a pipeline that is not loaded yet.
        guidance_free: see `guidance.guidance_adapters`; of such a pipeline, too. True for what the model has of its
            own (`guidance.own_adapters`).
        sla: see `sla.sla_adapters`.
        rope: see `length.chosen_riflex`.
        components: see `single_file.whole_model`.
        preset: see `presets.request_preset`; what it says holds where the request says nothing.
        levers: see `presets.with_levers`; by name, None for what is not asked for.
        process: one of several that make the video together. share: see `processes.share_out`.

    Raises:
        BadInput: what cannot be done; the first fault found, the cheapest to find first.
    """
    adapters = {"lora": lora, "guidance_free": guidance_free, "sla": sla}
    request = filled(preset, levers or {}, settings, sparse, adapters)
    with said_of_preset(request.of_preset):
        return _prepared(model, request, compare, device, dtype, offload, tiling, rope, components, process, share)


def _prepared(
    model: str | DiffusionPipeline,
    request: Filled,
    compare: bool,
    device: str | torch.device,
    dtype: str | torch.dtype,
    offload: bool | str,
    tiling: bool,
    rope: str,
    components: str | Path | None,
    process: Process,
    share: str,
) -> Job:
    settings, sparse, preset = request.settings, request.sparse, request.preset
    lora, guidance_free, sla = request.lora, request.guidance_free, request.sla
    reads: dict[str, Any] = {name: getattr(settings, name) for name in INPUTS}
    reads |= {"model": model, "components": components, "decoder": preset and preset.decoder}
    rest = None if preset is None else beside(preset)
    check_methods(sparse.methods, compare, rest is not None)
    loras = lora_files(lora)
    if loras and not isinstance(model, str):
        raise BadInput("lora", "is for a model that is loaded here", "Load it with load_lora_weights of the pipeline.")
    asked = bool(loras or sla or sparse.methods) or compare or any(sparse.given().values()) or rope != "plain"
    own, own_note = built_in_lora(model, settings.frames, asked)
    loras = loras or own
    trained = trained_lengths(loras)
    chosen_here = not sparse.methods
    sparse = _with_trained_method(sparse, trained, compare)
    adapters = () if isinstance(guidance_free, bool) else guidance_adapters(guidance_free)
    if (adapters or guidance_free is True) and not isinstance(model, str) and "guidance_free" not in request.of_preset:
        problem = "is for a model that is loaded here"
        raise BadInput("guidance_free", problem, "Call vidaccel.guidance_free with the pipeline.")
    learned = sla_adapters(sla, sparse.names)
    if learned and chosen_here:
        sparse = replace(sparse, methods=("sla",))
    if isinstance(model, str):
        model = whole_model(model, components)
        place = choose_device(device, offload)
        check_count(process.count, place, process.here)
        if process.count > 1 and place.type != "cpu":
            place = torch.device(place.type, process.local)
        chosen_dtype = choose_dtype(dtype, place, model)
        given = {field: field in settings.given for field in ("image", "video", "last_image")}
        facts, pipe = inspect_model(model, **given), None
    else:
        refuse_given({"components": components is not None}, "for a single file, and this is a loaded pipeline")
        check_untouched(model)
        _refuse_placing(device=device, dtype=dtype, offload=offload, tiling=tiling)
        index = dict(getattr(model, "config", {}))
        pipe = as_class(model, variant(type(model).__name__, settings.given, index))
        facts = inspect_pipeline(pipe, index)
        if facts.row.tiled and not pipe.vae.use_tiling:
            problem = "its autoencoder can decode in tiles alone"
            raise BadInput("model", problem, "Call enable_tiling() of its vae first.", value=facts.pipeline_class)
        place, chosen_dtype = pipe._execution_device, dtype_of(pipe)
    of_weights = placed(facts, pipe)
    if guidance_free is True:
        adapters = own_adapters(of_weights)
    settings = suited(settings, adapters, facts).checked(facts)
    check_guidance(adapters, of_weights, settings)
    if preset is not None:
        check_beside(preset, facts, settings, offload, place)
        check_guidance_cache(preset, settings, bool(adapters))
        check_scheduler(preset, adapters)
    check_fits(loras, facts)
    check_bases(loras, facts)
    of_loras = check_targets(loras, facts)
    riflex = chosen_riflex(rope, trained, facts)
    if compare:
        fix = f"Give a larger video, or leave {mention('compare')} out."
        check_comparable(settings.height, settings.width, fix)
    reads |= {"lora": [lora.path for lora in loras]}
    reads |= {field: [each.path for each in found] for field, found in (("guidance_free", adapters), ("sla", learned))}
    layout = settings.layout(facts)
    sharing = share_out(process.count, share, facts, settings, layout, bool(adapters), rest, place)
    few_steps = None if facts.trained_for else facts.most_steps
    by_length = not (sparse.methods or facts.only_dense or (few_steps is not None and not compare))
    limit = limit_of(facts, place, chosen_dtype) if by_length else None
    least = None if limit is None else limit.tokens
    runs, why = choose_runs(sparse.methods, compare, layout.tokens, facts.trained_for, least, few_steps)
    if chosen_here and (trained or learned):
        why = f"what {trained[0].name if trained else learned[0].path.name} was trained for"
    if facts.only_dense:
        runs, why = _dense_alone(facts, sparse, compare and rest is None)
    names = [name_of(run) for run in runs]
    check_sparse_only(names, bool(sparse.methods), sparse.given(), least, few_steps)
    check_runs(sparse.backend, place, sparse=any(name != DENSE for name in names))
    check_formats(sparse.backend, place, sparse.precision, chosen_dtype)

    def sla_method() -> Method | None:
        asked = {"first_steps": sparse.dense_steps, "first_layers": sparse.dense_layers}
        schedule = {name: value for name, value in asked.items() if value is not None}
        overrides = sparse.overrides.get("sla", {})
        return trained_method(learned, facts, pipe, layout, sparse.density, overrides, schedule)

    methods, left_out = methods_of_runs(
        runs, sparse, layout, place, sla_method, lambda: trained_settings(facts, pipe), request.method
    )
    if compare and len(methods) == 1 and rest is not None:
        methods[levers_alone(rest)] = None
    if left_out and not any(methods.values()):
        why = f"{next(iter(left_out))} is the choice, but cannot do this video"
    check_trained(trained, methods, layout)
    of_runs = [*taken_notes(lora, loras), *taken_notes(guidance_free, adapters), *taken_notes(sla, learned)]
    unknown = unknown_note(facts.name, settings.prompt, settings.negative_prompt or "")
    notes = [*filter(None, [model_note(facts), own_note, unknown]), *request.notes, *of_runs, *of_loras]
    told = "" if limit is None or compare or facts.trained_for else limit.why
    if told and limit.measured:
        notes.append(told)
    notes += [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    made = [(label, method) for label, method in methods.items() if method is not None]
    notes += filter(None, (expected_note(label, method, layout, sparse.density) for label, method in made))
    notes += filter(None, (whole_note(label, method, layout, sparse.density) for label, method in made))
    notes += filter(None, [trained_note(facts.trained_for, methods, compare)])
    if preset is not None:
        measured = measured_note(preset, settings, chosen_dtype, place)
        notes += filter(None, [other_model_note(preset, of_weights), measured])
    notes += trained_elsewhere(loras, facts)
    notes += trained_otherwise(loras, methods, sparse.density)
    if settings.height % 2 or settings.width % 2:
        wide, high = (size + size % 2 for size in (settings.width, settings.height))
        notes.append(f"The file has {wide}x{high} pixels, the last row or column twice: H.264 needs even sizes.")
    return Job(
        facts,
        settings,
        layout,
        methods,
        why,
        compare,
        sparse.backend,
        place,
        chosen_dtype,
        offload=offload,
        tiling=tiling,
        density=sparse.density,
        inputs=local_files(reads),
        pipe=pipe,
        notes=tuple(notes),
        measure_error=sparse.measure_error,
        loras=loras,
        guidance_free=adapters,
        sla=learned,
        riflex=riflex,
        beside=rest,
        hint="" if limit is None or limit.measured else told,
        precision=sparse.precision,
        process=process,
        sharing=sharing,
        of_preset=request.of_preset,
    )


def _with_trained_method(sparse: Sparse, trained: Sequence[TrainedLength], compare: bool) -> Sparse:
    """The request with the attention of the LoRAs where none is asked for.

    Raises:
        BadInput: a comparison, whose dense video would be another attention than that of the training.
    """
    if not trained:
        return sparse
    if compare:
        what = f"{trained[0].name} was trained for one attention alone ({trained[0]})"
        raise BadInput("compare", f"is of no use: {what}", f"Leave it out, or the LoRA ({mention('lora')}).")
    method = trained[0].method
    if sparse.methods:
        return sparse
    if method is None:
        return replace(sparse, methods=(DENSE,))
    # By its name where settings are given, of which the differences to those of the training are then told.
    named = any(sparse.given()[name] for name in ("density", "dense_steps", "dense_layers", "settings"))
    return replace(sparse, methods=(method.name if named else method,))


def _dense_alone(facts: ModelFacts, sparse: Sparse, compare: bool) -> tuple[list[str | Method], str]:
    """The run of a pipeline whose attention cannot be made sparse; BadInput where anything else was asked for."""
    for name in sparse.names:
        if name != DENSE:
            raise BadInput("method", facts.only_dense, "Give dense, or leave it out.", value=name)
    if compare:
        raise BadInput("compare", f"is of no use: {facts.only_dense}", "Leave it out.")
    return [DENSE], f"a {facts.pipeline_class} has no sparse attention here"


def _refuse_placing(**given: Any) -> None:
    told = {name: value not in ("auto", False) for name, value in given.items()}
    refuse_given(told, "for a model that is yet to be loaded, and this pipeline is loaded")
