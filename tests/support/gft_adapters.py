"""Guidance-free adapters of tiny transformers, with random weights, as the recipe `gft` writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vidaccel.pipelines.files.weight_files import transformer_files


def random_lora(transformer, part: str) -> tuple[torch.Generator, dict[str, torch.Tensor]]:
    """A LoRA on the queries of each block, by the names in files, and the generator that made it."""
    generator, tensors = torch.Generator().manual_seed(len(part)), {}
    for number in range(len(transformer.blocks)):
        layer = transformer.blocks[number].attn1.to_q
        for letter, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
            name = f"diffusion_model.blocks.{number}.self_attn.q.lora_{letter}.weight"
            tensors[name] = 0.3 * torch.randn(shape, generator=generator)
    return generator, tensors


def write_adapter(
    folder: Path, base: Path, transformer, part: str = "transformer", gated: bool = True, frequencies: int = 64, **facts
) -> Path:
    """An adapter of a transformer that was saved in the pipeline folder `base`; keywords change its header.

    The trainer's have 256 frequencies.
    """
    generator, tensors = random_lora(transformer, part)
    width = transformer.condition_embedder.time_embedder.linear_2.out_features
    tensors["beta_embedder.linear.weight"] = 0.1 * torch.randn(width, frequencies, generator=generator)
    header = {
        "recipe": "gft",
        "base": base.name,
        "base_hash": transformer_files(str(base), part),
        "part": part,
        "rank": 2,
        "levels": [0.0, 1.0],
        "unconditional": "blurry",
        "guidance_free": {"loss": "white_box", "max_scale": 6.0, "gated": gated},
        **facts,
    }
    file = folder / f"{part}.safetensors"
    save_file(tensors, file, {"format": "pt", "vidaccel": json.dumps(header)})
    return file


def write_native(folder: Path, blocks: int = 3, width: int = 48, gated: bool = True, **facts) -> Path:
    """An adapter of the tiny native Wan of ComfyUI, of random weights."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    tensors = {"beta_embedder.linear.weight": random(width, 64)}
    for number in range(blocks):
        layer = f"diffusion_model.blocks.{number}.self_attn.q"
        tensors |= {f"{layer}.lora_A.weight": random(2, width), f"{layer}.lora_B.weight": random(width, 2)}
    header = {"recipe": "gft", "base": "tiny", "base_hash": "0", "part": "transformer", "rank": 2, "unconditional": ""}
    header["guidance_free"] = {"loss": "white_box", "max_scale": 6.0, "gated": gated}
    file = folder / "adapter.safetensors"
    save_file(tensors, file, {"format": "pt", "vidaccel": json.dumps({**header, **facts})})
    return file
