"""The report of an accelerated model: what was sparse, what stayed dense and why, as text and as a heat map."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..attention import RunReport

ReportType = io.Custom("VIDACCEL_REPORT")


class ReportHandle:
    """What goes along a `VIDACCEL_REPORT` wire: asked for its report once sampling is done.

    Args:
        source: has `report() -> RunReport`; None for a model that stayed as it was.
    """

    def __init__(self, source: Any | None) -> None:
        self._source = source

    def report(self) -> RunReport | None:
        """Of the runs so far; None where nothing is accelerated or nothing has run."""
        report = None if self._source is None else self._source.report()
        return report if report is not None and report.records else None

    def text(self) -> str:
        """A table of density, backend and seconds, and why calls stayed dense."""
        if self._source is None:
            return "This model is not known, so its attention stayed dense. See the log."
        report = self.report()
        if report is None:
            notes = "\n".join(self._source.report().notes)
            return "No attention call was accelerated" + (f":\n{notes}" if notes else " yet.")
        return str(report)


def heat_map(report: RunReport | None) -> torch.Tensor:
    """Density by layer and step as an IMAGE `[1, H, W, 3]` in [0, 1]; an empty map without a report."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from ..figures import heat_map as draw

    values = np.full((1, 1), np.nan) if report is None else report.last().density_map()
    figure = draw(values, "density")
    figure.set_facecolor("white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).float().div(255).unsqueeze(0)


class AccelerationReport(io.ComfyNode):
    """The report node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelReport",
            display_name="Acceleration Report",
            category="video acceleration",
            description="What an accelerated model did: density and backend, what stayed dense and why, seconds, and "
            "the density of each layer and step as a picture. Connect the sampler's latent: it runs after sampling.",
            inputs=[
                ReportType.Input("report", tooltip="From a Sparse Attention node."),
                io.Latent.Input("after", tooltip="The sampler's output: the report is made when it is there."),
            ],
            outputs=[
                io.String.Output(display_name="text"),
                io.Image.Output(display_name="heat_map"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # the report changes with every run, though its inputs do not

    @classmethod
    def execute(cls, report: ReportHandle, after: dict[str, Any]) -> io.NodeOutput:
        return io.NodeOutput(report.text(), heat_map(report.report()), after)


NODES = [AccelerationReport]
