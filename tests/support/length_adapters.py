"""LoRAs for longer videos of tiny transformers, with random weights, as the recipe `length` writes them."""

from __future__ import annotations

import json
from pathlib import Path

from gft_adapters import random_lora
from safetensors.torch import save_file

from vidaccel.attention import DenseSchedule, Radial
from vidaccel.pipelines.files.weight_files import transformer_files
from vidaccel.pipelines.length.trained import TrainedLength, facts_of_length

METHOD = Radial(8, decay=0.3, min_window=0, sink=False, schedule=DenseSchedule(first_layers=1))


def write_length(
    folder: Path, base: Path, transformer, part: str = "transformer", frames: int = 17, method=METHOD, riflex=None
) -> Path:
    """A LoRA of a transformer that was saved in the pipeline folder `base`."""
    _, tensors = random_lora(transformer, part)
    trained = TrainedLength(method, 0.3, 2, frames, riflex)
    header = {
        "recipe": "length",
        "base": base.name,
        "base_hash": transformer_files(str(base), part),
        "part": part,
        "rank": 2,
        "levels": [0.0, 1.0],
        "length": facts_of_length(trained),
    }
    file = folder / f"{part}.safetensors"
    save_file(tensors, file, {"format": "pt", "vidaccel": json.dumps(header)})
    return file
