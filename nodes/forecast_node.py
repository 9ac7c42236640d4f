"""The node for the forecast cache of a MODEL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pipelines.forecast.settings import ForecastSettings
from .native.forecast import MAX_TOLERANCE, cache_steps, forecast_log
from .report.wording import said_of_inputs
from .report_node import Report
from .schema import accepted

DEFAULTS = ForecastSettings()


class VidaccelForecastCache(io.ComfyNode):
    """Steps left out of a MODEL's sampling where what the model would make of them can be told ahead."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelForecastCache",
            display_name="Forecast Cache",
            category="video acceleration",
            description="Computes only the steps whose noise cannot be told ahead from the steps before, and goes by "
            "the error that its own forecasts turned out to have. For every model and sampler without fresh noise in "
            "each step; no training.",
            inputs=[
                io.Model.Input("model", tooltip="It is not changed."),
                io.Float.Input(
                    "tolerance",
                    default=DEFAULTS.tolerance,
                    min=0.001,
                    max=MAX_TOLERANCE,
                    step=0.001,
                    tooltip="How far off what the model makes in a step may be, as a share of its size. More is faster "
                    "and less exact: 0.05 is careful, 0.2 is fast.",
                ),
                io.Int.Input(
                    "first_steps",
                    default=DEFAULTS.first_steps,
                    min=0,
                    max=100,
                    tooltip="Steps at the sampler's start that are computed; three are, whatever it says.",
                ),
                io.Int.Input(
                    "last_steps",
                    default=DEFAULTS.last_steps,
                    min=0,
                    max=100,
                    **accepted(io.Int.Input, advanced=True),
                    tooltip="Steps at its end that are computed.",
                ),
                io.Int.Input(
                    "max_consecutive",
                    default=DEFAULTS.most,
                    min=0,
                    max=100,
                    **accepted(io.Int.Input, advanced=True),
                    tooltip="Steps in a row that are left out at the most; 0 for any number.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For a sampler, or Sparse Attention."),
                Report.Output(
                    display_name="report", tooltip="For the node Sparse Attention Report: what was left out."
                ),
            ],
            **accepted(io.Schema, search_aliases=["vidaccel", "cache", "teacache", "skip steps", "speed up video"]),
        )

    @classmethod
    def execute(
        cls, model: Any, tolerance: float, first_steps: int, last_steps: int, max_consecutive: int
    ) -> io.NodeOutput:
        with said_of_inputs("ForecastSettings", most="max_consecutive"):
            settings = ForecastSettings(tolerance, first_steps, last_steps, max_consecutive)
        log = forecast_log()
        return io.NodeOutput(cache_steps(model, settings, log), log)


NODES: list[type[io.ComfyNode]] = [VidaccelForecastCache]
