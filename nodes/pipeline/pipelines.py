"""Video pipelines of diffusers under ComfyUI: which there are, loading one, and what nodes put before a run of it.

No ComfyUI module is imported here: the nodes hand in what moves weights, what stops a run and what shows progress, so
that tests can run all of it. diffusers is imported inside functions, since it takes seconds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...generation.calls import as_class
from ...generation.errors import BadInput
from ...generation.levers.guidance import check_adapters, guidance_adapters, own_adapters
from ...generation.levers.length import check_bases, trained_lengths
from ...generation.levers.lora_fit import trained_elsewhere
from ...generation.machine import check_runs, choose_dtype
from ...generation.models.facts import ModelFacts
from ...generation.models.inspected import inspect_model
from ...generation.models.places import DEMOS
from ...generation.packages import lacking
from ...generation.run import load as load_pipeline
from ..report.wording import InputError, check_precision, check_stand_ins, plain_messages
from .acceleration import Acceleration
from .loras import Lora, attach
from .residency import Residency

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ...pipelines.guidance_free.adapter_file import GuidanceFreeAdapter
    from ...pipelines.length.trained import TrainedLength
    from ...pipelines.presets import Preset

# What the menu shows -> what it is called elsewhere.
BUILT_IN = {f"{name} (built-in)": name for name in DEMOS}
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements-pipelines.txt"


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


# -- what is on the wire -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VideoPipeline:
    """A loaded pipeline and how to accelerate it. Immutable: `accelerated` gives another one with the same weights.

    Args:
        facts: what its configs say.
        pipe: the diffusers pipeline; dense between two runs, whatever `acceleration` says.
        residency: sees to it that the part at work is on the device.
        acceleration: None for dense attention.
        guidance_free: adapters for guidance in one pass; none for two.
        trained: what LoRAs for longer videos in it were trained with.
        preset: all levers at once; None for none.
        notes: what is to be said of its LoRAs with each video.
    """

    facts: ModelFacts
    pipe: DiffusionPipeline
    residency: Residency
    acceleration: Acceleration | None = None
    trained: tuple[TrainedLength, ...] = ()
    guidance_free: tuple[GuidanceFreeAdapter, ...] = ()
    preset: Preset | None = None
    notes: tuple[str, ...] = ()

    def guided_in_one_pass(self, adapters: Sequence[Path]) -> VideoPipeline:
        """The same weights with guidance in one pass, this object as it is.

        Args:
            adapters: a file or folder for each transformer; none for what the model has of its own.

        Raises:
            InputError: one cannot be read or is of another model, or the model has none of its own; or the pipeline is
                guided in one pass already.
        """
        if self.guidance_free:
            raise InputError(
                "this pipeline is guidance-free already: connect the pipeline from before the other Guidance-Free "
                "Pipeline."
            )
        for lever in ("guidance_free", "guidance_cache"):
            if getattr(self.preset, lever, None):
                raise InputError(f"the preset {self.preset.name} has {lever}: leave one of the two out.")
        with plain_messages():
            found = guidance_adapters(adapters) if adapters else own_adapters(self.facts)
            check_adapters(found, self.facts)
        return replace(self, guidance_free=found)

    def accelerated(self, acceleration: Acceleration) -> VideoPipeline:
        """The same weights with an acceleration, this object as it is.

        Raises:
            ValueError: the backend cannot run on the device, or not with `compensate`, Tangent or that precision.
            InputError: all of its layers would stay dense, a LoRA in it was trained for an attention of its own, or it
                has an acceleration already.
        """
        if self.acceleration is not None:
            raise InputError(
                "this pipeline has sparse attention already: connect the pipeline from before the other Accelerate "
                "Pipeline or Apply SLA (Pipeline)."
            )
        if self.trained:
            raise InputError(
                f"{self.trained[0].name} was trained for one attention alone ({self.trained[0]}), which Generate Video "
                "takes from its file: leave Accelerate Pipeline out."
            )
        if self.preset is not None and self.preset.method is not None:
            raise InputError(f"the preset {self.preset.name} has a method: leave one of the two out.")
        with plain_messages():
            check_runs(acceleration.backend, self.residency.device, sparse=True)
            if not self.facts.only_dense:
                acceleration.check_layers(self.pipe)
        check_stand_ins(acceleration.backend, self.residency.device, acceleration.stand_ins)
        check_precision(acceleration.backend, self.residency.device, acceleration.precision)
        return replace(self, acceleration=acceleration)

    def starting_from(self, given: Sequence[str]) -> VideoPipeline:
        """The same weights in the pipeline that takes what is given, of image, last_image and video.

        Raises:
            BadInput: a video for one of Wan 2.2's with two transformers.
        """
        facts = inspect_model(self.facts.name, **{name: name in given for name in ("image", "last_image", "video")})
        if facts.pipeline_class == self.facts.pipeline_class:
            return self
        return replace(self, facts=facts, pipe=as_class(self.pipe, facts.pipeline_class))


# -- loading -----------------------------------------------------------------------------------------------------------


def require_packages(who: str = "diffusers pipelines need", more: Sequence[str] = ()) -> None:
    """Raise InputError when a package that pipelines need is not there or too old: native models run without them.

    Args:
        who: needs them, as the start of the message.
        more: what it needs besides, as pip takes it.
    """
    if wrong := lacking(REQUIREMENTS, more):
        beside = "".join(f' "{each}"' for each in more)
        raise InputError(f"{who} {', '.join(wrong)}: with ComfyUI's Python, pip install -r {REQUIREMENTS}{beside}")


def load(
    model: str, dtype: str, residency: Residency, loras: Sequence[Lora] = (), field: str = "pipeline"
) -> VideoPipeline:
    """Load a pipeline; its weights stay in main memory until they are used.

    Args:
        model: "demo", a folder, or a hub id.
        dtype: "auto" or a name of `machine.DTYPES`.
        residency: for its device; hooks itself into the pipeline.
        loras: to be put into its transformers.
        field: the input that names it, for errors.

    Raises:
        InputError: there is no such pipeline, it is not one that can be accelerated, its weights cannot be read, or a
            LoRA does not fit it.
    """
    require_packages()
    with plain_messages(model=field):
        facts = inspect_model(model)
        chosen = choose_dtype(dtype, residency.device, model)
        trained = trained_lengths(loras)
        check_bases(loras, facts)
        import torch

        # ComfyUI runs nodes in inference mode, whose tensors could not be adapted or trained later.
        with torch.inference_mode(False):
            pipe = load_pipeline(facts, chosen, "cpu")
            attach(pipe, loras)
    residency.attach(pipe)
    return VideoPipeline(facts, pipe, residency, trained=trained, notes=tuple(trained_elsewhere(loras, facts)))
