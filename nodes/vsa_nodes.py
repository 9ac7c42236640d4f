"""The node that puts VSA, with the gates of a model, into a native model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from .adapter_files import BY_PATH
from .native.vsa import gated
from .pipeline.pipelines import find_pipelines
from .report.wording import STEP, InputError
from .report_node import Report
from .schema import accepted
from .sparse_nodes import CATEGORY, backend_input, measure_error_input, min_tokens_input, precision_input
from .watched import Fingerprint, State, fingerprint, read, state_of

KIND = "diffusion_models"
"""ComfyUI's name for the folder of files that may have gates."""


def _folders() -> dict[str, Path]:
    """Pipelines of models/diffusers that have a transformer -> their folders."""
    import folder_paths

    folders = find_pipelines(folder_paths.get_folder_paths("diffusers"))
    return {name: folder for name, folder in folders.items() if (folder / "transformer").is_dir()}


def _names() -> list[str]:
    """What the menu has: files of models/diffusion_models, and pipelines. Where a file is, is looked up when it is
    read: a link to nowhere is among the names, too, and must not keep the nodes from loading."""
    import folder_paths

    files = [name for name in folder_paths.get_filename_list(KIND) if name.endswith(".safetensors")]
    return [*files, *(name for name in _folders() if name not in files)]


def _place(gates: str, path: str) -> Path | None:
    """The place that two inputs name; None where neither does, or it is gone."""
    import folder_paths

    if path.strip():
        return Path(path.strip()).expanduser()
    if folder := _folders().get(gates):
        return folder
    file = folder_paths.get_full_path(KIND, gates) if gates.endswith(".safetensors") else None
    return None if file is None else Path(file)


def _chosen(gates: str, path: str) -> Path:
    """The place that two inputs name.

    Raises:
        InputError: neither names one, or it is gone.
    """
    found = _place(gates, path)
    if found is not None:
        return found
    if gates == BY_PATH:
        raise InputError("gates: choose the file that Load Diffusion Model has, or give the path of a file or folder.")
    others = ", ".join(name for name in _names() if name != gates)
    raise InputError(f"gates is {gates}: it is no longer there; there are {others or 'none'}.")


def _state(place: Path) -> State | None:
    """`state_of` a file, or of the transformer in the folder of a pipeline."""
    inner = place / "transformer"
    return state_of(inner if inner.is_dir() else place)


class VidaccelApplyVSA(io.ComfyNode):
    """VSA in a native model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VidaccelApplyVSA",
            display_name="Apply VSA",
            category=CATEGORY,
            description="Video Sparse Attention for a model that was trained for it, such as FastVideo's FastWan: each "
            "cube of the video reads the cubes whose means score highest, and attention of the means is added, times "
            "gates that the model learned. Load Diffusion Model leaves the gates out, so this node reads them. For Wan "
            "2.1 and 2.2, text to video. FastWan takes three steps: the sampler lcm at the sigmas 1, 0.757, 0.522 "
            "and 0 (ManualSigmas), with a cfg of 1.",
            inputs=[
                io.Model.Input("model", tooltip="The native model that was trained for VSA; it is not changed."),
                io.Combo.Input(
                    "gates",
                    options=[BY_PATH, *_names()],
                    default=BY_PATH,
                    tooltip="Where the gates are: the same file as in Load Diffusion Model, when `vidaccel convert "
                    "fastwan` wrote it (`python -m vidaccel convert fastwan` in custom_nodes, where the pack was "
                    "copied), or a pipeline in models/diffusers.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    tooltip="Path of such a file, or of the folder of a pipeline or its transformer, such as "
                    "FastVideo's download; it is taken instead of the one above.",
                ),
                io.Float.Input(
                    "density",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=STEP,
                    tooltip="Share of the cubes of keys that each cube of queries reads. 0 is that of the training: "
                    "0.2 for FastWan 1.3B and 5B, 0.1 for 14B. 1 reads all of them.",
                ),
                min_tokens_input(),
                backend_input(),
                measure_error_input(),
                precision_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with its gates, and sparse attention."),
                Report.Output(display_name="report", tooltip="For the node Sparse Attention Report."),
            ],
            **accepted(
                io.Schema, search_aliases=["vidaccel", "fastwan", "video sparse attention", "speed up video", "dmd"]
            ),
        )

    @classmethod
    def fingerprint_inputs(cls, gates: str | None, path: str | None, **others: Any) -> Fingerprint:
        """Read a file anew once it was changed."""
        place = _place(gates or "", path or "")
        return fingerprint(None if place is None else _state(place), gates, path)

    @classmethod
    def execute(cls, model: Any, gates: str, path: str, density: float, **common: Any) -> io.NodeOutput:
        return io.NodeOutput(*gated(model, read(_chosen(gates, path), _state), density, **common))


NODES: list[type[io.ComfyNode]] = [VidaccelApplyVSA]
