"""The pipelines that can be run, one `PipelineRow` a class of diffusers; a new pipeline is a row here."""

from __future__ import annotations

from . import cogvideo, cosmos, hunyuan, kandinsky, ltx, others, wan
from .row import Config, PipelineRow, patch_of
from .sequence import Shape

__all__ = ["NOT_RUN", "ROWS", "Config", "PipelineRow", "Shape", "find_row", "patch_of"]

ROWS: dict[str, PipelineRow] = {
    row.pipeline: row for family in (wan, hunyuan, cogvideo, ltx, cosmos, kandinsky, others) for row in family.ROWS
}
"""By the name of the class."""

_IMAGES = "it makes images"
_STAGE = "it is one stage of several, and starts from latents of another"
NOT_RUN: dict[str, str] = {
    **dict.fromkeys(
        ("Cosmos2TextToImagePipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"), "it makes images"
    ),
    **dict.fromkeys(
        (
            "LTX2DFRPipeline",
            "LTX2DFRTemporalRefinePipeline",
        ),
        _STAGE,
    ),
    "LTXI2VLongMultiPromptPipeline": "it has a prompt and a seed for each part of a video",
    "LTX2InContextPipeline": "it starts from reference videos of an IC-LoRA",
    "LTX2HDRPipeline": "it starts from a video, and what it makes is no picture before it is tone-mapped",
    "Cosmos2_5_TransferPipeline": "it is led by several control videos of a ControlNet",
    "EasyAnimateControlPipeline": "its call fails in diffusers 0.42.1, which hands a method an argument that it lacks",
}
"""Classes whose transformers `accelerate` knows and that are not run here, with why."""


def find_row(pipeline: str, transformer: Config | None = None, index: Config | None = None) -> PipelineRow | None:
    """The row of a pipeline class, for the model that configs describe; None for a class that has none.

    Args:
        pipeline: name of the class.
        transformer: config of the transformer.
        index: config of the pipeline, as in `model_index.json`.
    """
    row = ROWS.get(pipeline)
    return row and row.by_config(row, transformer or {}, index or {})
