"""The node for the guidance cache of a MODEL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pipelines.guidance_cache.settings import GuidanceCache
from .native.guidance_cache import cache_guidance, guidance_log
from .report.wording import InputError, said_of_inputs
from .report_node import Report
from .schema import accepted


class VidaccelGuidanceCache(io.ComfyNode):
    """Passes of the negative prompt left out of a MODEL's sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelGuidanceCache",
            display_name="Guidance Cache",
            category="video acceleration",
            description="Makes the pass of the negative prompt in some steps only, and extrapolates its difference to "
            "the other one in between. For every model that is sampled with a cfg above 1; no training, and the "
            "sampler, its cfg and both prompts stay as they are.",
            inputs=[
                io.Model.Input("model", tooltip="It is not changed."),
                io.Int.Input(
                    "every",
                    default=3,
                    min=2,
                    max=20,
                    tooltip="After the first steps, one pass of the negative prompt in so many is made. More is faster "
                    "and less exact.",
                ),
                io.Float.Input(
                    "first_percent",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the sampler's steps, at its start, in which both passes are made.",
                ),
                io.Float.Input(
                    "extrapolation",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    **accepted(io.Float.Input, advanced=True),
                    tooltip="How far the difference of the two passes goes on along its last change: 0 keeps it as it "
                    "was.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For a sampler, or Sparse Attention."),
                Report.Output(
                    display_name="report", tooltip="For the node Sparse Attention Report: what was left out."
                ),
            ],
            **accepted(io.Schema, search_aliases=["vidaccel", "cfg", "cfg cache", "negative prompt", "speed up video"]),
        )

    @classmethod
    def execute(cls, model: Any, every: int, first_percent: float, extrapolation: float) -> io.NodeOutput:
        if not 0 <= first_percent <= 1:
            raise InputError(f"first_percent is {first_percent:g}: it is a share of the steps, from 0 to 1.")
        with said_of_inputs("GuidanceCache"):
            settings = GuidanceCache(every, first_steps=float(first_percent), extrapolation=extrapolation)
        log = guidance_log()
        return io.NodeOutput(cache_guidance(model, settings, log), log)


NODES: list[type[io.ComfyNode]] = [VidaccelGuidanceCache]
