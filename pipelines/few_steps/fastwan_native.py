"""The transformer of a FastWan model as one file for ComfyUI's *Load Diffusion Model*, with the gates of VSA in it.

ComfyUI does not read diffusers' names of Wan. In a file whose names begin with `PREFIX` it takes these alone and leaves
the others out without a word, as it does with the text encoder in a checkpoint; gates among its own names would each
be told as an unexpected key. So they lie beside it in the same file, below `BESIDE`, where `Apply VSA` finds them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ...attention import VSA
from ..acceleration.vsa_gates import GATE, TrainedVSA
from ..files.adapter_header import FACTS
from ..files.renamed_weights import write_renamed
from ..files.weight_files import weights_of
from .wan_names import renamed

PREFIX = "model.diffusion_model."
BESIDE = "vsa."


def write_native(folder: Path, target: Path, trained: TrainedVSA | None) -> Path:
    """Write the transformer of a checked folder.

    Args:
        folder: see `fastwan_folder`.
        target: of the new file.
        trained: what it was trained for, which the file's header states; None without gates.
    """
    metadata = {"format": "pt"}
    if trained is not None:
        metadata[FACTS] = json.dumps({VSA.name: asdict(trained)})
    return write_renamed(weights_of(str(folder)), target, native_name, metadata)


def native_name(own: str) -> str:
    """What a tensor of a FastWan transformer is called in the file."""
    return f"{BESIDE}{own}" if f".{GATE}." in own else f"{PREFIX}{renamed(own, 'original')}"
