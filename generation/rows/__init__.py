"""The pipelines that can be run, one `PipelineRow` a class of diffusers; a new pipeline is a row here."""

from __future__ import annotations

from . import cogvideo, cosmos, hunyuan, kandinsky, ltx, others, wan
from .row import Config, PipelineRow, patch_of
from .sequence import Shape

__all__ = ["ROWS", "Config", "PipelineRow", "Shape", "find_row", "patch_of"]

ROWS: dict[str, PipelineRow] = {
    row.pipeline: row for family in (wan, hunyuan, cogvideo, ltx, cosmos, kandinsky, others) for row in family.ROWS
}
"""By the name of the class."""


def find_row(pipeline: str, transformer: Config | None = None, index: Config | None = None) -> PipelineRow | None:
    """The row of a pipeline class, for the model that configs describe; None for a class that has none.

    Args:
        pipeline: name of the class.
        transformer: config of the transformer.
        index: config of the pipeline, as in `model_index.json`.
    """
    row = ROWS.get(pipeline)
    return row and row.by_config(row, transformer or {}, index or {})
