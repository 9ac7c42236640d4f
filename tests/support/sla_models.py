"""Models and adapters for SLA with random weights, as the recipe `sla` writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from vidaccel import SLA, demo
from vidaccel.pipelines.acceleration.sla_weights import TrainedSLA, add_projections, names_in, write_config
from vidaccel.pipelines.files.weight_files import transformer_files

METHOD = SLA(topk=0.3, block=(8, 8))


def demo_parts() -> dict:
    """What the built-in pipeline has beside its transformer."""
    pipe = WanPipeline.from_pretrained(demo.path(), transformer=None)
    return {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}


def modules_of(transformer) -> dict:
    """The self-attention modules of a Wan transformer by path."""
    return {f"blocks.{number}.attn1": block.attn1 for number, block in enumerate(transformer.blocks)}


def learned(transformer) -> dict[str, torch.Tensor]:
    """Projections for a transformer."""
    generator, dim = torch.Generator().manual_seed(4), transformer.config.attention_head_dim
    shapes = {name: (dim, dim) if name.endswith("weight") else (dim,) for name in names_in(modules_of(transformer))}
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_model(folder: Path, base: Path, part: str = "transformer", method: SLA = METHOD, **facts) -> Path:
    """The pipeline in the folder `base` with projections in one of its transformers; keywords change what it states."""
    if not folder.exists():
        shutil.copytree(base, folder)
    transformer = WanTransformer3DModel.from_pretrained(folder, subfolder=part)
    if method.needs_weights:
        add_projections(modules_of(transformer), transformer.config.attention_head_dim)
        transformer.load_state_dict(learned(transformer), strict=False)
    transformer.save_pretrained(folder / part)
    trained = TrainedSLA.of(method, facts.pop("tokens", ()), "base", transformer_files(str(base), part))
    write_config(folder / part, TrainedSLA(**{**vars(trained), **facts}))
    return folder


def write_adapter(folder: Path, base: Path, part: str = "transformer", method: SLA = METHOD, **changes) -> Path:
    """An adapter of a transformer of the pipeline folder `base`; keywords change its header."""
    transformer = WanTransformer3DModel.from_pretrained(base, subfolder=part)
    tensors = learned(transformer)
    generator = torch.Generator().manual_seed(changes.pop("rank_seed", len(part)))
    for number, block in enumerate(transformer.blocks):
        layer = block.attn1.to_q
        for letter, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
            name = f"diffusion_model.blocks.{number}.self_attn.q.lora_{letter}.weight"
            tensors[name] = 0.3 * torch.randn(shape, generator=generator)
    left_out = changes.pop("left_out", "")
    tensors = {name: value for name, value in tensors.items() if name != left_out}
    trained = TrainedSLA.of(method, (), base.name, changes.pop("base_hash", transformer_files(str(base), part)))
    header = {"recipe": "sla", "part": part, "sla": trained.facts(), **changes}
    file = folder / f"{part}.safetensors"
    save_file(tensors, file, {"format": "pt", "vidaccel": json.dumps(header)})
    return file
