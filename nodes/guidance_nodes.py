"""The nodes for guidance in one pass: for a MODEL of ComfyUI, and for a pipeline of diffusers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter_files import BY_PATH, chosen_file, fingerprint_of_chosen
from .native.guidance import guide
from .pipeline.pipelines import VideoPipeline, require_packages
from .pipeline_nodes import CATEGORY, Pipeline
from .schema import accepted
from .watched import Fingerprint, fingerprint, read, state_of

OWN = "the model's own"


def _adapter_inputs(first: str, tooltip: str) -> list[Any]:
    import folder_paths

    return [
        io.Combo.Input(
            "adapter", options=[first, *folder_paths.get_filename_list("loras")], default=first, tooltip=tooltip
        ),
        io.String.Input(
            "path",
            default="",
            tooltip="Path of an adapter, of the folder that has it, or of that of its training; it is taken instead of "
            "the one above.",
        ),
    ]


class VidaccelGuidanceFree(io.ComfyNode):
    """Guidance in one pass for a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelGuidanceFree",
            display_name="Guidance-Free",
            category="video acceleration",
            description="Guidance in one pass a step instead of two, for Wan 2.1 and 2.2, with an adapter that the "
            "recipe gft (or consistency, for few steps as well) trained for this model. The guidance is set here: the "
            "sampler runs with a cfg of 1 whatever it has, and its negative prompt is not used, since the adapter has "
            "one baked in.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the adapter was trained on. It is not changed."),
                *_adapter_inputs(BY_PATH, "A file in models/loras."),
                io.Float.Input(
                    "guidance",
                    default=5.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="What cfg is without this node, up to the highest that the adapter was trained for.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For a sampler, or Sparse Attention.")],
            **accepted(io.Schema, search_aliases=["vidaccel", "gft", "cfg", "guidance distillation", "speed up video"]),
        )

    @classmethod
    def fingerprint_inputs(cls, adapter: str | None, path: str | None, **others: Any) -> Fingerprint:
        """Read a file anew once it was changed."""
        return fingerprint_of_chosen(adapter, path)

    @classmethod
    def execute(cls, model: Any, adapter: str, path: str, guidance: float) -> io.NodeOutput:
        require_packages("Guidance-Free, which reads files of the trainer, needs")
        return io.NodeOutput(guide(model, chosen_file(adapter, path, "adapter"), guidance))


class VidaccelGuidanceFreePipeline(io.ComfyNode):
    """Guidance in one pass for a pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelGuidanceFreePipeline",
            display_name="Guidance-Free Pipeline",
            category=CATEGORY,
            description="Guidance in one pass a step instead of two, for pipelines of Wan and DC-VideoGen, with an "
            "adapter that the recipe gft (or consistency, for few steps as well) trained for this model. guidance of "
            "Generate Video keeps its meaning; a negative prompt is refused, since the adapter has one baked in.",
            inputs=[
                Pipeline.Input("pipeline", tooltip="From Load Video Pipeline. It is not changed."),
                *_adapter_inputs(OWN, "What the model has of its own, if it has one; or a file in models/loras."),
                io.String.Input(
                    "second_path",
                    default="",
                    **accepted(io.String.Input, advanced=True),
                    tooltip="Of Wan 2.2 14B, which has two transformers: path of the adapter of the second.",
                ),
            ],
            outputs=[Pipeline.Output(display_name="pipeline", tooltip="For Accelerate Pipeline or Generate Video.")],
            **accepted(io.Schema, search_aliases=["vidaccel", "gft", "cfg", "guidance distillation"]),
        )

    @classmethod
    def fingerprint_inputs(
        cls, adapter: str | None, path: str | None, second_path: str | None = "", **others: Any
    ) -> tuple[Fingerprint, ...]:
        """Read a file anew once it was changed."""
        second = fingerprint(state_of((second_path or "").strip()), second_path)
        return fingerprint_of_chosen(adapter, path), second

    @classmethod
    def execute(cls, pipeline: VideoPipeline, adapter: str, path: str, second_path: str = "") -> io.NodeOutput:
        places = [] if not path.strip() and adapter == OWN else [chosen_file(adapter, path, "adapter")]
        if second_path.strip():
            places.append(read(second_path.strip()))
        return io.NodeOutput(pipeline.guided_in_one_pass(places))


NODES: list[type[io.ComfyNode]] = [VidaccelGuidanceFree, VidaccelGuidanceFreePipeline]
