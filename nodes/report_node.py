"""The node that shows what sparse attention did, once the sampler is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from .native.patch import queue_entry
from .report.news import BYPASSED, nothing
from .report.tables import report_image, report_text
from .schema import accepted

if TYPE_CHECKING:
    from .native.override import NativeAttention
    from .report.cache_log import CacheLog, CachesReport
    from .report.news import GenerationReport

Report = io.Custom("VIDACCEL_REPORT")


class VidaccelReport(io.ComfyNode):
    """Text and heat map of a sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelReport",
            display_name="Sparse Attention Report",
            category="video acceleration",
            description="What sparse attention did in this sampling: the density of every step, what stayed dense and "
            "why, which backend ran, and the seconds in attention; measured errors, where the node measures them; or "
            "why there is nothing to show. The picture shows the density, and the errors, of each layer and step.",
            inputs=[
                Report.Input(
                    "report",
                    optional=True,
                    tooltip="The report output of a Sparse Attention node. Without one, as when that node is bypassed, "
                    "the text says so.",
                ),
                io.AnyType.Input(
                    "after",
                    tooltip="The sampler's LATENT, or anything made from it: the report waits for it, so that there is "
                    "something to report.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The table, for a node such as Preview as Text."),
                io.Image.Output(
                    display_name="heat_map",
                    tooltip="Density, and measured errors, of every layer (rows) and step (columns).",
                ),
                io.AnyType.Output(display_name="after", tooltip="What came in as after, unchanged."),
            ],
            is_output_node=True,
            **accepted(io.Schema, search_aliases=["vidaccel", "density", "statistics", "heat map"]),
        )

    @classmethod
    def execute(
        cls, after: Any, report: NativeAttention | GenerationReport | CacheLog | CachesReport | None = None
    ) -> io.NodeOutput:
        news = nothing(BYPASSED) if report is None else report.news(queue_entry())
        image = report_image(news.report)
        return io.NodeOutput(report_text(news), image, after, ui=ui.PreviewImage(image, cls=cls))


NODES: list[type[io.ComfyNode]] = [VidaccelReport]
