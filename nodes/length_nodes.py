"""The node that loads a LoRA for longer videos into a native model, with the attention that it was trained for."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter_files import chosen_file, fingerprint_of_chosen
from .lora_nodes import file_inputs
from .native.length import lengthened
from .report.wording import PRECISIONS
from .report_node import Report
from .schema import accepted
from .sparse_nodes import CATEGORY, backend_input, measure_error_input, precision_input
from .watched import Fingerprint


class VidaccelRadialLength(io.ComfyNode):
    """A LoRA of the recipe `length` in a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelRadialLength",
            display_name="Radial Length",
            category=CATEGORY,
            description="Videos longer than Wan was trained on: loads a LoRA of this package's recipe length, and "
            "gives the model the sparse attention that the LoRA was trained for, which its file states. A longer video "
            "than those of its training is refused. For a pipeline, give the LoRA to Pipeline LoRA, which does the "
            "same.",
            inputs=[
                io.Model.Input("model", tooltip="A native Wan model. It stays as it is; the output is a clone."),
                *file_inputs(),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="The LoRA's change of the model is multiplied by this; 1 is as trained.",
                ),
                backend_input(),
                measure_error_input(),
                precision_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA and its attention."),
                Report.Output(display_name="report", tooltip="For the node Sparse Attention Report."),
            ],
            **accepted(io.Schema, search_aliases=["vidaccel", "long video", "radial attention", "length extension"]),
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str | None, path: str | None, **others: Any) -> Fingerprint:
        """Read a file anew once it was changed."""
        return fingerprint_of_chosen(lora, path)

    @classmethod
    def execute(
        cls,
        model: Any,
        lora: str,
        path: str,
        weight: float,
        backend: str,
        measure_error: int = 0,
        precision: str = PRECISIONS[0],
    ) -> io.NodeOutput:
        file = chosen_file(lora, path, "lora")
        made = lengthened(model, file, weight, backend=backend, measure_error=measure_error, precision=precision)
        return io.NodeOutput(*made)


NODES: list[type[io.ComfyNode]] = [VidaccelRadialLength]
