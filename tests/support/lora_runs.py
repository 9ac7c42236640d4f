"""Settings of tiny runs of the recipe `lora`, shared by its tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from vidaccel.lora.config import build, read
from vidaccel.lora.recipes import find
from vidaccel.lora.recipes.base import Process
from vidaccel.lora.recipes.lora import TrainLora

SIZE = {"frames": 5, "height": 32, "width": 48}


def write(folder: Path, base: Path, **sections) -> Path:
    """Settings of a run of 2 steps, in `folder/a.yaml`; keywords change sections, and `recipe`."""
    folder.mkdir(exist_ok=True)
    content = {
        "recipe": sections.pop("recipe", "lora"),
        "out": str(folder / "run"),
        "model": {"base": str(base)},
        "lora": {"rank": 2, "alpha": 6},
        "data": {"kind": "demo", "clips": 6, "contact_sheet": 0, "sizes": [SIZE], "cache": str(folder / "cache")},
        "train": {"steps": 2, "learning_rate": 0.01, "batch_size": 2},
        "validation": {"clips": 2, "prompts": ["a red circle"], "steps": 2, "guidance_scale": 2},
        "loop": {"tracker": "none", "device": "cpu", "log_every": 1},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    file = folder / "a.yaml"
    file.write_text(json.dumps(content))
    return file


def recipe(file: Path, overrides: Sequence[str] = ()) -> TrainLora:
    """The recipe of the settings, prepared."""
    content = read(file, overrides)
    kind = find(content["recipe"])
    made = kind(build(kind.Config, content), Process(torch.device("cpu")))
    made.prepare()
    return made
