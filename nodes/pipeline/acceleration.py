"""What *Accelerate Pipeline* puts on the wire: a method and what stays dense, for a video of any size."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...attention import METHODS as SPARSE_METHODS
from ...attention.methods.base import OutOfReach
from ...attention.schedule import OTHERWISE
from ...generation.errors import BadInput
from ...generation.levers.methods import DEFAULT_METHOD, build_method
from ...generation.tuning.store import limit_of
from ..defaults import defaults_of
from ..native.limits import chosen_limit, too_short
from ..report.wording import PRECISIONS, InputError, check_shares, chosen_precision, limit_words

if TYPE_CHECKING:
    import torch

    from ...attention import Method, RunReport, VideoLayout
    from ...generation.models.facts import ModelFacts

OWN = defaults_of(SPARSE_METHODS[DEFAULT_METHOD])
# A field of `DenseSchedule` -> the input that sets it.
_OF_SCHEDULE = {
    "first_steps": "dense_start_percent",
    "last_steps": "dense_end_percent",
    "first_layers": "dense_layers",
}
METHODS = ("tangent", "svg2", "svg", "radial", "sparge", "vsa")


@dataclass(frozen=True)
class Acceleration:
    """A method and what stays dense, before the size of the video is known. Fields are named as the node's inputs.

    Args:
        method: one of `METHODS`.
        density: pairs computed over all pairs, in the sparse steps.
        dense_start_percent, dense_end_percent: shares of the steps at the start and the end that stay dense.
        dense_layers: so many transformer blocks at the input stay dense.
        compensate: skipped clusters enter through their mean. For svg2 alone.
        backend: a name, or "auto".
        min_tokens: videos with fewer tokens stay dense.
        measure_error: queries of each sparse call whose true error is measured; 0 measures nothing.
        precision: in which the scores of sparse calls are computed, of `PRECISIONS`.

    Raises:
        ValueError: a value out of its bounds.
    """

    method: str = DEFAULT_METHOD
    density: float = OWN.density
    dense_start_percent: float = OWN.start
    dense_end_percent: float = OWN.end
    dense_layers: int = OWN.layers
    compensate: bool = True
    backend: str = "auto"
    min_tokens: int = 0
    measure_error: int = 0
    precision: str = PRECISIONS[0]

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BadInput("method", f"there is none of that name; there are {', '.join(METHODS)}", value=self.method)
        if not 0 < self.density <= 1:
            raise BadInput("density", "it must be above 0 and at most 1 (1 computes all pairs)", value=self.density)
        instead = "For a dense video, connect the pipeline from before this node."
        check_shares(self.dense_start_percent, self.dense_end_percent, instead)
        for name in ("dense_layers", "min_tokens", "measure_error"):
            if getattr(self, name) < 0:
                raise BadInput(name, "it must be 0 or more", value=getattr(self, name))
        chosen_precision(self.precision)

    @property
    def adapters(self) -> tuple[Path, ...]:
        """Files of what was trained for the method; see `accelerate`."""
        return ()

    @property
    def stand_ins(self) -> str:
        """What stands for skipped keys, see `check_stand_ins`; empty for nothing."""
        if self.method == "svg2":
            return "compensate" if self.compensate else ""
        return "tangent" if self.method == "tangent" else ""

    def check_layers(self, pipe: object) -> None:
        """Raise BadInput where a pipeline has no block left that could be sparse."""
        from ...pipelines.acceleration import find_transformers

        for transformer, family in find_transformers(pipe).values():
            blocks = max(family.depths(transformer), default=-1) + 1
            if self.dense_layers >= blocks:
                problem = f"this model has {blocks} transformer blocks, so nothing would be sparse"
                fix = f"Give {blocks - 1} at most, or connect the pipeline from before this node."
                raise BadInput("dense_layers", problem, fix, value=self.dense_layers)

    def on(self, facts: ModelFacts, device: torch.device, dtype: torch.dtype) -> tuple[Acceleration, str]:
        """The same on a machine, and what a report should say of it; "" for nothing.

        Where `min_tokens` is its default, and it was measured there from how many tokens the method pays, that counts.
        """
        tokens, why = chosen_limit(self.min_tokens, lambda: limit_of(facts, device, dtype, self.method))
        return replace(self, min_tokens=tokens), why

    def dense_reason(self, layout: VideoLayout) -> str:
        """Why a video stays dense as a whole, empty when it may be sparse."""
        return too_short(self.min_tokens, layout)

    def method_for(self, layout: VideoLayout) -> Method | None:
        """The method at the size of a video; None where that stays dense.

        Raises:
            InputError: it cannot do what is asked at this size.
        """
        if self.dense_reason(layout):
            return None
        try:
            method = build_method(
                self.method,
                layout,
                density=self.density,
                overrides={"compensate": True} if self.stand_ins == "compensate" else {},
                dense_steps=float(self.dense_start_percent),
                dense_layers=self.dense_layers,
            )
        except BadInput as error:
            if not isinstance(error.__cause__, OutOfReach):
                raise
            raise InputError(limit_words(error.__cause__, layout, vars(self))) from error
        return replace(method, schedule=replace(method.schedule, last_steps=float(self.dense_end_percent)))

    def reported(self, report: RunReport) -> RunReport:
        """The report of a run in the words of the node: its settings, and the input that each dense call is owed to."""
        config: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "method"}
        config["measure_error"] = self.measure_error or None
        config["precision"] = chosen_precision(self.precision)
        if self.method != "svg2":
            del config["compensate"]
        reasons = {field.replace("_", " "): name for field, name in _OF_SCHEDULE.items()}
        records = tuple(replace(record, reason=reasons.get(record.reason, record.reason)) for record in report.records)
        notes = tuple(_worded(note) for note in report.notes)
        return replace(report, method=self.method, config=config, records=records, notes=notes)


def _worded(note: str) -> str:
    """A note with the fields of a schedule named as the inputs."""
    for field, name in _OF_SCHEDULE.items():
        note = re.sub(rf"\b{field}\b", name, note)
    return note.replace(OTHERWISE, "raise dense_start_percent or dense_end_percent for more")
