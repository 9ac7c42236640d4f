"""The node that finds the fastest preset for a pipeline by measuring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..generation.requests.values import MAX_SEED
from ..generation.tuning.space import EFFORTS
from .pipeline.tuning import folder_of, is_written, tuned
from .pipeline_nodes import CATEGORY, Pipeline
from .preset_nodes import Preset
from .schema import accepted
from .watched import Watched

if TYPE_CHECKING:
    from .pipeline.pipelines import VideoPipeline

LEVERS = {
    "sparse": ("sparse", "precision"),
    "caches": ("cache",),
    "adapters": ("adapter",),
    "guidance_cache": ("guidance",),
    "compiled_blocks": ("compile",),
}
"""Inputs -> the levers of `tune` that they switch."""


WRITTEN = Watched()
"""Folders that were written."""


class VidaccelTune(io.ComfyNode):
    """`vidaccel tune` for a pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        own = "0 takes the model's own."
        none = "0 asks for none."
        return io.Schema(
            node_id="VidaccelTune",
            display_name="Tune",
            category=CATEGORY,
            description="Finds the fastest preset for a pipeline within a budget, by measuring on this machine: "
            "methods and densities of sparse attention, caches over steps, second passes of guidance left out, "
            "compiled blocks, adapters beside the model. It makes many videos: minutes for the built-in models, hours "
            "for large ones. Cancel stops it within a step; what was measured is kept in its folder, and the same "
            "inputs go on with it.",
            inputs=[
                Pipeline.Input("pipeline", tooltip="From Load Video Pipeline, without a node that accelerates it."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One a line, such as you will use; four to eight are enough.",
                ),
                io.Float.Input(
                    "min_psnr",
                    default=30.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip=f"Budget: dB to the dense videos of the same seeds. The fastest preset is sought. {none}",
                ),
                io.Float.Input(
                    "max_error",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="Budget: error of a step against dense, relative; 0.05 is 5 %. No adapter is tried then. "
                    + none,
                ),
                io.Float.Input(
                    "max_time_ratio",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip=f"Budget: share of the dense time. The preset nearest to dense is then sought. {none}",
                ),
                io.Combo.Input(
                    "effort",
                    options=list(EFFORTS),
                    default="normal",
                    tooltip="How finely densities and thresholds are tried.",
                ),
                io.Int.Input(
                    "confirm",
                    default=6,
                    min=1,
                    max=50,
                    tooltip="Candidates of which whole videos are made, at the most.",
                ),
                io.Boolean.Input(
                    "sparse", default=True, tooltip="Try sparse attention, and its scores in 8 bits where that can be."
                ),
                io.Boolean.Input("caches", default=True, tooltip="Try caches over steps."),
                io.Boolean.Input(
                    "adapters",
                    default=True,
                    tooltip="Try the adapters for guidance in one pass or few steps that lie beside the model.",
                ),
                io.Boolean.Input(
                    "guidance_cache",
                    default=True,
                    tooltip="Try to make the second pass of guidance in some steps only.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    default="",
                    tooltip="What the videos should not show. Used where guidance is above 1.",
                ),
                *(
                    io.Int.Input(side, default=0, min=0, max=8192, tooltip=f"Pixels. {own}")
                    for side in ("width", "height")
                ),
                io.Int.Input("frames", default=0, min=0, max=4097, tooltip=f"As in Generate Video. {own}"),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip=f"Denoising steps. {own}"),
                io.Float.Input(
                    "guidance", default=0.0, min=0.0, max=30.0, step=0.1, tooltip=f"As in Generate Video. {own}"
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    # Left out, ComfyUI's page draws a new one after each run, and a search could not be gone on with.
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the first video; the others have the next ones.",
                ),
                io.String.Input(
                    "name",
                    default="vidaccel_tune",
                    tooltip="Of a folder below ComfyUI's output, for the page, the preset and what was measured. "
                    "Another model, size or other prompts need another.",
                ),
                # At the end and optional, for workflows that were saved before it was there.
                io.Boolean.Input(
                    "compiled_blocks",
                    default=True,
                    optional=True,
                    tooltip="Try the blocks of the transformer compiled by torch, where a compiler for the device is "
                    "there. A measurement then takes longer, until the blocks are compiled.",
                ),
            ],
            outputs=[
                Preset.Output(
                    display_name="preset", tooltip="For Apply Preset; one without levers where dense is fastest."
                ),
                io.String.Output(display_name="text", tooltip="What was found, and where the page is."),
            ],
            is_output_node=True,
            **accepted(io.Schema, search_aliases=["vidaccel", "speed up video", "benchmark", "optimise", "preset"]),
        )

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> int:
        """Write a folder anew that was deleted."""
        return WRITTEN.changes()

    @classmethod
    def execute(
        cls,
        pipeline: VideoPipeline,
        prompts: str,
        min_psnr: float,
        max_error: float,
        max_time_ratio: float,
        effort: str,
        confirm: int,
        guidance: float,
        negative_prompt: str,
        seed: int,
        name: str,
        **given: int,
    ) -> io.NodeOutput:
        import folder_paths

        folder = folder_of(name, Path(folder_paths.get_output_directory()))
        made = tuned(
            pipeline,
            prompts,
            folder,
            bounds={"min_psnr": min_psnr, "max_error": max_error, "max_time_ratio": max_time_ratio},
            levers=[lever for switch, levers in LEVERS.items() if given.get(switch, True) for lever in levers],
            effort=effort,
            confirm=confirm,
            seed=seed,
            settings={
                "negative_prompt": negative_prompt,
                "guidance_scale": guidance or None,
                **{each: given[each] or None for each in ("width", "height", "frames", "steps")},
            },
            show=_bar(),
        )
        WRITTEN.remember(folder, lambda: is_written(folder))
        return io.NodeOutput(made.preset, made.text, ui=ui.PreviewText(made.text))


def _bar() -> Callable[[int, int | None], None]:
    """ComfyUI's progress bar."""
    import comfy.utils

    bar = comfy.utils.ProgressBar(1)
    return lambda done, total: None if total is None else bar.update_absolute(min(done, total), total)


NODES: list[type[io.ComfyNode]] = [VidaccelTune]
