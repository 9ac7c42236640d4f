"""Adapters of the recipe `sla` in ComfyUI: what they were trained for, and whether they fit a native model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...generation.errors import BadInput
from ...generation.levers.sla import trained_method
from ..pipeline.acceleration import Acceleration
from ..pipeline.pipelines import require_packages
from ..report.wording import InputError
from .learned_layers import check_wan

if TYPE_CHECKING:
    import torch

    from ...attention import Method, RunReport, VideoLayout
    from ...generation.models.facts import ModelFacts
    from ...pipelines.acceleration.sla import SLAAdapter


def open_adapter(location: str | Path) -> SLAAdapter:
    """What the header of an adapter says.

    Raises:
        InputError: there is none, or it is of another recipe; or diffusers is not installed.
    """
    require_packages("Apply SLA, which reads files of the trainer, needs")
    from ...pipelines.acceleration.sla import read_adapter
    from ...pipelines.acceleration.sla_weights import SLAError

    try:
        return read_adapter(location)
    except SLAError as error:
        raise InputError(f"sla: {error}") from error


def matrices_and_projections(
    adapter: SLAAdapter, model: Any
) -> tuple[dict[str, torch.Tensor], Mapping[int, dict[str, torch.Tensor]]]:
    """The LoRA of an adapter, and the weight and the bias of each layer's projection.

    Args:
        adapter: for it.
        model: ComfyUI's module of the diffusion model. Its weights cannot be told from those that the adapter was
            trained on, since files for ComfyUI are others than those of diffusers; its class and shapes can.

    Raises:
        InputError: it is of another class or shape.
    """
    from ...pipelines.acceleration.sla_weights import PROJECTION, SLAError, check_complete, names_in
    from ...pipelines.files.adapter_files import read_split

    check_wan(model, adapter.path.name, "text or image to video")
    layers, dim = range(len(model.blocks)), model.dim // model.num_heads
    learned = [f"blocks.{layer}.attn1" for layer in layers][adapter.trained.dense_layers :]
    lora, tensors = read_split(adapter.path, lambda key: f".{PROJECTION}." in key)
    if adapter.trained.linear_scope == "none":
        return lora, {}
    wanted = names_in(learned)
    try:
        check_complete(wanted, tensors, adapter.path.name)
    except SLAError as error:
        raise InputError(f"sla: {error}") from error
    shapes = {tuple(tensors[name].shape) for name in wanted}
    if len(tensors) != len(wanted) or shapes != {(dim, dim), (dim,)}:
        raise InputError(
            f"sla: {adapter.path.name} has {len(tensors) // 2} layers of {min(shapes)[0]} channels a head, and this "
            f"model {len(wanted) // 2} of {dim}: give the adapter of this model ({adapter.base}, {adapter.part})."
        )
    return lora, {
        layer: {kind: tensors[f"{path}.{PROJECTION}.{kind}"] for kind in ("weight", "bias")}
        for layer, path in zip(layers[adapter.trained.dense_layers :], learned, strict=True)
    }


@dataclass(frozen=True)
class LearnedSLA(Acceleration):
    """SLA with the settings of the training, in the place of an `Acceleration`.

    Args:
        facts: of the model.
        learned: adapters, one for each transformer; none where the weights of the model were trained.
        backend, min_tokens, measure_error, precision: as those of `Acceleration`; the rest is not used.
    """

    facts: ModelFacts | None = None
    learned: tuple[SLAAdapter, ...] = ()
    stand_ins = ""

    def __post_init__(self) -> None:
        for name in ("min_tokens", "measure_error"):
            if getattr(self, name) < 0:
                raise BadInput(name, "it must be 0 or more", value=getattr(self, name))

    @property
    def adapters(self) -> tuple[Path, ...]:
        return tuple(adapter.path for adapter in self.learned)

    def check_layers(self, pipe: object) -> None:
        """Nothing to check: which stay dense was decided in the training."""

    def on(self, facts: ModelFacts, device: torch.device, dtype: torch.dtype) -> tuple[Acceleration, str]:
        return self, ""  # from how many tokens it pays is measured of methods that need no training

    def method_for(self, layout: VideoLayout) -> Method | None:
        if self.dense_reason(layout):
            return None
        method = trained_method(self.learned, self.facts, None, layout, None, {}, {})
        if method is None:
            raise InputError(
                "pipeline was not trained for SLA: give an adapter of the recipe sla, or a pipeline that it made."
            )
        return method

    def reported(self, report: RunReport) -> RunReport:
        shown = ("topk", "block", "linear_scope", "backend", "measure_error", "precision")
        config = {name: report.config[name] for name in shown if name in report.config}
        adapters = {"sla": ", ".join(path.name for path in self.adapters)} if self.learned else {}
        return replace(report, config=adapters | config)
