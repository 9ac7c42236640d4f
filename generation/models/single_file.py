"""A model that is named by a single file, and the pipeline that has what is not in it."""

from __future__ import annotations

from pathlib import Path

from ..errors import BadInput, mention


def whole_model(model: str, components: str | Path | None) -> str:
    """Folder or hub id of a model; of a single file, the folder that it is converted to, see `single_file.pipeline_of`.

    Args:
        model: as it is asked for.
        components: of a single file, folder or hub id of the pipeline that has all else.

    Raises:
        BadInput: a file that cannot be used, or without components; or components of no file.
    """
    from ...pipelines.files.locations import is_single_file
    from ...pipelines.files.weight_files import stated_config

    if not is_single_file(model):
        if components is not None:
            problem = "is of use only with a single file as the model"
            raise BadInput("components", problem, "Leave it out.", value=components)
        return model
    if components is None:
        fix = f"Give the diffusers pipeline that has the others as {mention('components')}, a folder or a hub id."
        raise BadInput("model", "it is a transformer alone, or no model", fix, value=model)
    from ...pipelines.files.single_file import LayoutError, SingleFileError, pipeline_of
    from .places import locate

    place = locate(str(components))
    try:
        folder = str(pipeline_of(model, place))
    except (SingleFileError, LayoutError, OSError) as error:
        raise BadInput("model", f"cannot be used: {str(error).rstrip('.')}") from error
    if stated_config(folder, "transformer_2") is not None:
        problem = "the pipeline has two transformers, and this is one"
        raise BadInput("model", problem, "Give a folder of diffusers that has both.", value=model)
    return folder
