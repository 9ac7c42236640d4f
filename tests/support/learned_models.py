"""The built-in pipeline with a tiny transformer, as it is and as trained for each method that needs weights."""

from __future__ import annotations

from pathlib import Path

from diffusers import WanPipeline
from sla_models import demo_parts, write_model
from tiny_wan import make_transformer
from vsa_models import TRAINED, write_gates


def write_models(folder: Path) -> dict[str, Path]:
    """Name -> folder: the base; "vsa" and "sla" as this package writes what was trained for them; and "published", with
    gates and nothing that states them."""
    shape = {"in_channels": 8, "out_channels": 8, "text_dim": 64}
    base = folder / "base"
    WanPipeline(**demo_parts(), transformer=make_transformer(**shape)).save_pretrained(base)
    write_gates(folder / "vsa", base, trained=TRAINED)
    write_gates(folder / "published", base)
    write_model(folder / "sla", base)
    return {path.name: path for path in folder.iterdir()}
