"""Video pipelines of diffusers under ComfyUI: which there are, loading one, accelerating it, making a video with it.

No ComfyUI module is imported here: the nodes hand in what moves weights, what stops a run and what shows progress, so
that tests can run all of it. diffusers is imported inside functions, since it takes seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation.errors import BadInput, mention
from ..generation.machine import check_runs, choose_dtype
from ..generation.methods import build_method
from ..generation.model_facts import DEMOS, ModelFacts, inspect_model
from ..generation.request import Settings
from ..generation.run import Run, StepCallback
from ..generation.run import load as load_pipeline
from ..generation.run import run as run_pipeline
from .residency import Residency

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from ..attention import Method, RunReport, VideoLayout

# What the menu shows -> what it is called elsewhere.
BUILT_IN = {f"{name} (built-in)": name for name in DEMOS}
METHODS = ("svg2", "svg", "radial")
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements-pipelines.txt"


# -- which pipelines there are -----------------------------------------------------------------------------------------


def find_pipelines(roots: list[str]) -> dict[str, Path]:
    """The pipelines that `save_pretrained` wrote below some folders.

    Args:
        roots: ComfyUI's folders for diffusers models, those that do not exist included.

    Returns:
        Path below its root, with "/" -> folder. The first of two of one name counts, as with ComfyUI's own models.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for folder, below, files in os.walk(root, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if "model_index.json" in files:
                below.clear()  # the parts of a pipeline are no pipelines
                found.setdefault(Path(folder).relative_to(root).as_posix(), Path(folder))
    return found


def locate(choice: str, hub_id: str, roots: list[str]) -> str:
    """What `inspect_model` is to look at: the hub id or folder that was typed, otherwise what was chosen.

    Raises:
        BadInput: the chosen folder is gone.
    """
    if hub_id.strip():
        return hub_id.strip()
    if choice in BUILT_IN:
        return BUILT_IN[choice]
    found = find_pipelines(roots)
    if choice not in found:
        problem = f"it is no longer in models/diffusers; there are {', '.join(found) or 'none'}"
        raise BadInput("model", problem, value=choice)
    return str(found[choice])


_NAMES = {
    "model": "pipeline",
    "guidance_scale": "guidance",
    "dense_start": "dense_start_percent",
    "dense_end": "dense_end_percent",
}


class InputError(ValueError):
    """An input that cannot be, in the words of a node."""


@contextmanager
def plain_messages() -> Iterator[None]:
    """Name the fields of a request as the inputs of the nodes are named."""
    try:
        yield
    except BadInput as error:
        raise InputError(error.worded(lambda field: _NAMES.get(field, field))) from error


# -- what is on the wire -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acceleration:
    """A method and what stays dense, before the size of the video is known.

    Args:
        method: one of `METHODS`.
        density: pairs computed over all pairs, in the sparse steps.
        dense_start, dense_end: shares of the steps at the start and the end that stay dense.
        dense_layers: so many transformer blocks at the input stay dense.
        compensate: skipped clusters enter through their mean (svg2).
        backend: a name, or "auto".

    Raises:
        BadInput: a value out of its bounds, or a setting that the method lacks.
    """

    method: str = "svg2"
    density: float = 0.3
    dense_start: float = 0.3
    dense_end: float = 0.0
    dense_layers: int = 0
    compensate: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadInput("method", f"there is none of that name; there are {', '.join(METHODS)}", value=self.method)
        if not 0 < self.density <= 1:
            raise BadInput("density", "it must be above 0 and at most 1 (1 computes all pairs)", value=self.density)
        for name in ("dense_start", "dense_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(name, "it is a share of the steps, between 0 and 1", value=getattr(self, name))
        if self.dense_start + self.dense_end >= 1:
            raise BadInput(
                "dense_start",
                f"{self.dense_start:g} and {mention('dense_end')} {self.dense_end:g} leave no step sparse: together "
                "they must stay below 1",
                "For a dense video, connect the pipeline from before this node.",
            )
        if self.dense_layers < 0:
            raise BadInput("dense_layers", "it must be 0 or more", value=self.dense_layers)
        if self.compensate and self.method != "svg2":
            raise BadInput("compensate", "is for svg2 alone", f"Switch it off for {self.method}.")

    def shown(self) -> dict[str, Any]:
        """The settings for a report, without those that do not apply."""
        return {name: value for name, value in vars(self).items() if name != "method" and value not in (False, 0)}

    def method_for(self, layout: VideoLayout) -> Method:
        """The method at the size of a video.

        Raises:
            BadInput: it cannot do what is asked at this size.
        """
        extra = {"compensate": True} if self.compensate else {}
        method = build_method(
            self.method,
            layout,
            density=self.density,
            overrides=extra,
            dense_steps=float(self.dense_start),
            dense_layers=self.dense_layers,
        )
        return replace(method, schedule=replace(method.schedule, last_steps=float(self.dense_end)))


@dataclass(frozen=True, eq=False)
class VideoPipeline:
    """A loaded pipeline and how to accelerate it. Immutable: `accelerated` gives another one with the same weights.

    Args:
        facts: what its configs say.
        pipe: the diffusers pipeline; dense between two runs, whatever `acceleration` says.
        residency: sees to it that the part at work is on the device.
        acceleration: None for dense attention.
    """

    facts: ModelFacts
    pipe: DiffusionPipeline
    residency: Residency
    acceleration: Acceleration | None = None

    def accelerated(self, acceleration: Acceleration) -> VideoPipeline:
        """The same weights with another acceleration, this object as it is.

        Raises:
            BadInput: the backend cannot run on the device.
        """
        with plain_messages():
            check_runs(acceleration.backend, self.residency.device, sparse=True)
        return replace(self, acceleration=acceleration)


@dataclass(frozen=True, eq=False)
class Generation:
    """What a run made.

    Args:
        frames: `[F, H, W, 3]` float32 on the CPU, in [0, 1], as ComfyUI's IMAGE.
        report: for the report node.
    """

    frames: torch.Tensor
    report: GenerationReport


@dataclass(frozen=True)
class GenerationReport:
    """The report of one generation, which the report node asks for with `news`.

    Args:
        run: of the accelerated attention, or an empty one of a dense run.
    """

    run: RunReport

    def news(self) -> RunReport:
        """The run that this report was made with."""
        return self.run


# -- loading and running -----------------------------------------------------------------------------------------------


def require_packages() -> None:
    """Raise InputError when a package that pipelines need is not there or too old: native models run without them."""
    from packaging.requirements import Requirement

    if not REQUIREMENTS.is_file():
        return  # the package was installed by pip, which has seen to it
    wrong = []
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            needed = Requirement(line)
            try:
                found = metadata.version(needed.name)
            except metadata.PackageNotFoundError:
                wrong.append(f"{needed} (not installed)")
                continue
            if not needed.specifier.contains(found, prereleases=True):
                wrong.append(f"{needed} (found {found})")
    if wrong:
        raise InputError(
            f"diffusers pipelines need {', '.join(wrong)}: with ComfyUI's Python, pip install -r {REQUIREMENTS}"
        )


def load(model: str, dtype: str, residency: Residency) -> VideoPipeline:
    """Load a pipeline; its weights stay in main memory until they are used.

    Args:
        model: "demo", a folder, or a hub id.
        dtype: "auto" or a name of `machine.DTYPES`.
        residency: for its device; hooks itself into the pipeline.

    Raises:
        InputError: there is no such pipeline, it is not one that can be accelerated, or its weights cannot be read.
    """
    require_packages()
    with plain_messages():
        facts = inspect_model(model)
        chosen = choose_dtype(dtype, residency.device, model)
        import torch

        # ComfyUI runs nodes in inference mode, whose tensors could not be adapted or trained later.
        with torch.inference_mode(False):
            pipe = load_pipeline(facts, chosen, "cpu")
    residency.attach(pipe)
    return VideoPipeline(facts, pipe, residency)


def generate(
    pipeline: VideoPipeline, settings: Settings, *, image: torch.Tensor | None = None, on_step: StepCallback
) -> Generation:
    """Make a video. The initial noise comes from a CPU generator, so a seed gives the same one on every device.

    Args:
        pipeline: what to run.
        settings: None in a field takes the model's own value.
        image: `[1, H, W, 3]` in [0, 1], the first frame for an image-to-video pipeline; scaled to the video's size.
        on_step: called at the end of every step; may raise to stop the run.

    Raises:
        InputError: the model cannot do this size, length or picture; nothing has run then.
        GenerationError: the model made NaN or infinite values.
    """
    with plain_messages():
        if image is not None:
            settings = replace(settings, image=_picture(image))
        settings = settings.checked(pipeline.facts)
        layout = pipeline.facts.layout(settings.frames, settings.height, settings.width)
        method = pipeline.acceleration.method_for(layout) if pipeline.acceleration else None
        pipeline.residency.begin(pipeline.pipe, layout, settings)
    start = time.perf_counter()
    backend = pipeline.acceleration.backend if pipeline.acceleration else "auto"
    made = run_pipeline(pipeline.pipe, settings, method, backend=backend, on_step=on_step)
    return _generation(pipeline, settings, made, time.perf_counter() - start)


def _generation(pipeline: VideoPipeline, settings: Settings, made: Run, seconds: float) -> Generation:
    import torch

    report = made.report
    if report is None:
        report = _dense_report()
    if pipeline.acceleration is not None:
        report = replace(report, config=pipeline.acceleration.shown())
    told = (
        f"{settings.frames} frames of {settings.width}x{settings.height}, {settings.steps} steps, guidance "
        f"{settings.guidance_scale:g}, seed {settings.seed}: {seconds:.1f} s with text and decoding"
    )
    report = replace(report, notes=(*report.notes, *made.notes, told))
    return Generation(torch.from_numpy(made.frames).contiguous(), GenerationReport(report))


def _dense_report() -> RunReport:
    from ..attention import RunReport

    note = "nothing was accelerated: Accelerate Pipeline, before Generate Video, does that"
    return RunReport("dense", {"attention": "the pipeline's own"}, (), (note,))


def _picture(image: torch.Tensor) -> Any:
    """The first picture of an IMAGE, as PIL has it."""
    from PIL import Image

    return Image.fromarray((image[0, ..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy())
