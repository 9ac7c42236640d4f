"""The node that names a LoRA for Load Video Pipeline; several make a chain."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter_files import BY_PATH, chosen_file, fingerprint_of_chosen
from .pipeline.loras import AUTOMATIC, TARGETS, Lora
from .schema import accepted
from .watched import Fingerprint

Loras = io.Custom("VIDACCEL_LORAS")


def file_inputs() -> list[io.Input]:
    """Which file: from ComfyUI's menu, or by its path."""
    import folder_paths

    return [
        io.Combo.Input(
            "lora",
            options=[BY_PATH, *folder_paths.get_filename_list("loras")],
            default=BY_PATH,
            tooltip="A file in models/loras.",
        ),
        io.String.Input(
            "path",
            default="",
            tooltip="Path of a file, of a folder with pytorch_lora_weights.safetensors, or of the folder of a "
            "training; it is taken instead of the one above.",
        ),
    ]


class VidaccelPipelineLoRA(io.ComfyNode):
    """A LoRA and its weight."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelPipelineLoRA",
            display_name="Pipeline LoRA",
            category="video acceleration/pipelines",
            description="A LoRA for Load Video Pipeline, with a weight. Several are connected one behind the other, "
            "through loras. Files of diffusers, ComfyUI and musubi-tuner are taken.",
            inputs=[
                *file_inputs(),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="The LoRA's change of the model is multiplied by this; 0 is without it.",
                ),
                io.Combo.Input(
                    "transformer",
                    options=[AUTOMATIC, *TARGETS],
                    default=AUTOMATIC,
                    **accepted(io.Combo.Input, advanced=True),
                    tooltip="Wan 2.2 14B has two: transformer for high noise, transformer_2 for low noise, each with "
                    "LoRAs of its own. automatic is the one that the file says it was trained for, or all where it "
                    "says nothing. Other models have one.",
                ),
                Loras.Input("loras", optional=True, tooltip="The LoRAs before this one in a chain."),
            ],
            outputs=[Loras.Output(display_name="loras", tooltip="For Load Video Pipeline, or the next Pipeline LoRA.")],
            **accepted(io.Schema, search_aliases=["vidaccel", "load lora", "lora stack"]),
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str | None, path: str | None, **others: Any) -> Fingerprint:
        """Read a file anew once it was changed."""
        return fingerprint_of_chosen(lora, path)

    @classmethod
    def execute(
        cls, lora: str, path: str, weight: float, transformer: str, loras: tuple[Lora, ...] = ()
    ) -> io.NodeOutput:
        target = None if transformer == AUTOMATIC else transformer
        return io.NodeOutput((*loras, Lora(chosen_file(lora, path, "lora"), weight, target)))


NODES: list[type[io.ComfyNode]] = [VidaccelPipelineLoRA]
