"""The nodes that apply what a model learned of SLA: in a native model, and in a diffusers pipeline."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .adapter_files import BY_PATH, chosen_file, fingerprint_of_chosen
from .native.geometry import diffusion_model_of
from .native.learned_layers import learned_layers
from .native.lora import with_lora
from .native.patch import sparsify
from .native.sla import LearnedSLA, matrices_and_projections, open_adapter
from .pipeline import pipelines
from .pipeline_nodes import CATEGORY as PIPELINES
from .pipeline_nodes import Pipeline
from .report.wording import plain_messages
from .report_node import Report
from .schema import accepted
from .sparse_nodes import CATEGORY, backend_input, measure_error_input, min_tokens_input, precision_input
from .watched import Fingerprint

WORDS = ["vidaccel", "sparse linear attention", "speed up video", "lora"]


def _adapter_inputs(of_path: str, of_file: str = "") -> list[io.Input]:
    """Which adapter, by name or by path."""
    import folder_paths

    return [
        io.Combo.Input(
            "sla",
            options=[BY_PATH, *folder_paths.get_filename_list("loras")],
            default=BY_PATH,
            tooltip=f"The adapter, a file in models/loras. {of_file}".rstrip(),
        ),
        io.String.Input("path", default="", tooltip=of_path),
    ]


def _places(path: str) -> list[str]:
    """The paths in an input that takes several, with a ; between them."""
    return [part.strip() for part in path.split(";") if part.strip()]


class VidaccelApplySLA(io.ComfyNode):
    """An adapter of the recipe `sla` in a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelApplySLA",
            display_name="Apply SLA",
            category=CATEGORY,
            description="Sparse-linear attention with an adapter of the recipe sla: a LoRA, a projection for each "
            "layer, and the settings that they were trained with, which are taken from the file. For Wan 2.1 and 2.2, "
            "text and image to video. Without the training such attention breaks the video; a MODEL with other weights "
            "than those of the training cannot be told here.",
            inputs=[
                io.Model.Input("model", tooltip="The native model that the adapter was trained on; it is not changed."),
                *_adapter_inputs(
                    "Path of the file, its folder, or that of its training; it is taken instead of the one above.",
                    "Of Wan 2.2 14B each of the two models has its own.",
                ),
                min_tokens_input(),
                backend_input(),
                measure_error_input(),
                precision_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the adapter, and sparse attention."),
                Report.Output(display_name="report", tooltip="For the node Sparse Attention Report."),
            ],
            **accepted(io.Schema, search_aliases=WORDS),
        )

    @classmethod
    def fingerprint_inputs(cls, sla: str | None, path: str | None, **others: Any) -> Fingerprint:
        """Read a file anew once it was changed."""
        return fingerprint_of_chosen(sla, path)

    @classmethod
    def execute(cls, model: Any, sla: str, path: str, **common: Any) -> io.NodeOutput:
        adapter = open_adapter(chosen_file(sla, path, "sla"))
        lora, projections = matrices_and_projections(adapter, diffusion_model_of(model))
        changed = with_lora(model, lora, 1.0, field="sla", file=adapter.path.name)
        trained = adapter.trained
        method = trained.method()
        told = {"sla": adapter.path.name, "topk": trained.topk, "block": method.block, "scope": trained.linear_scope}
        dense = ", ".join(map(str, range(trained.dense_layers)))
        return io.NodeOutput(
            *sparsify(
                changed,
                lambda layout: method,
                name="SLA",
                settings=told,
                weights=learned_layers(model, projections) if projections else None,
                dense_layers=dense,
                **common,
            )
        )


class VidaccelPipelineSLA(io.ComfyNode):
    """SLA in a diffusers pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelPipelineSLA",
            display_name="Apply SLA (Pipeline)",
            category=PIPELINES,
            description="Sparse-linear attention for a pipeline that was trained for it, or with an adapter of the "
            "recipe sla, whose settings are those of the training. The pipeline that comes in stays dense.",
            inputs=[
                Pipeline.Input("pipeline", tooltip="From Load Video Pipeline. It is not changed."),
                *_adapter_inputs(
                    "Path of the file, its folder, or that of its training, instead of the one above; two, with a ; "
                    "between them, for Wan 2.2 14B. Empty for a pipeline whose weights were trained."
                ),
                min_tokens_input(),
                backend_input(),
                measure_error_input(),
                precision_input(),
            ],
            outputs=[Pipeline.Output(display_name="pipeline", tooltip="For Generate Video.")],
            **accepted(io.Schema, search_aliases=WORDS),
        )

    @classmethod
    def fingerprint_inputs(cls, sla: str | None, path: str | None, **others: Any) -> tuple[Fingerprint, ...]:
        """Read files anew once they were changed."""
        places: list[str | None] = [None] if path is None else [*(_places(path) or [""])]
        return tuple(fingerprint_of_chosen(sla, place) for place in places)

    @classmethod
    def execute(cls, pipeline: pipelines.VideoPipeline, sla: str, path: str, **common: Any) -> io.NodeOutput:
        places = _places(path) or ([""] if sla != BY_PATH else [])
        learned = tuple(open_adapter(chosen_file(sla, place, "sla")) for place in places)
        with plain_messages():
            acceleration = LearnedSLA(facts=pipeline.facts, learned=learned, **common)
        return io.NodeOutput(pipeline.accelerated(acceleration))


NODES: list[type[io.ComfyNode]] = [VidaccelApplySLA, VidaccelPipelineSLA]
