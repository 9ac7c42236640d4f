"""Models for VSA with random gates, named as FastVideo publishes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from vidaccel.pipelines.acceleration.vsa_gates import GATE, TrainedVSA, write_config
from vidaccel.pipelines.files.weight_files import WEIGHTS

TRAINED = TrainedVSA(density=0.3, cube=(1, 2, 2))


def gates(transformer, within: str = "") -> dict[str, torch.Tensor]:
    """Gates for a transformer; `within` is "attn1." for those that lie in the attention."""
    generator, width = torch.Generator().manual_seed(5), transformer.blocks[0].attn1.to_q.in_features
    made = {}
    for number in range(len(transformer.blocks)):
        name = f"blocks.{number}.{within}{GATE}"
        made[f"{name}.weight"] = 0.5 * torch.randn(width, width, generator=generator)
        made[f"{name}.bias"] = torch.randn(width, generator=generator)
    return made


def write_gates(
    folder: Path, base: Path, part: str = "transformer", within: str = "", trained: TrainedVSA | None = None, **changes
) -> Path:
    """The pipeline in the folder `base` with gates in one of its transformers.

    Args:
        trained: what a file beside them says; None for no file, as it is published.
        changes: name of a tensor, with _ for every dot -> None to leave it out, or another tensor.
    """
    if not folder.exists():
        shutil.copytree(base, folder)
    transformer = WanTransformer3DModel.from_pretrained(folder, subfolder=part)
    tensors = load_file(folder / part / WEIGHTS) | gates(transformer, within)
    for name in list(tensors):
        if (key := name.replace(".", "_")) in changes:
            tensors[name] = changes[key]
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / part / WEIGHTS, {"format": "pt"})
    if trained is not None:
        write_config(folder / part, trained)
    return folder


def as_published(folder: Path, pipeline: str = "WanDMDPipeline") -> Path:
    """Name the pipeline class in the index of a folder as FastVideo does."""
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": pipeline}))
    return folder


@torch.no_grad()
def velocity(transformer) -> torch.Tensor:
    """What a transformer in the latent space of the built-in model makes of a video of 3x4x6 tokens."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 8, 3, 8, 12, generator=generator).to(transformer.dtype)
    text = torch.randn(1, 5, 64, generator=generator).to(transformer.dtype)
    return transformer(hidden_states=latents, timestep=torch.tensor([500.0]), encoder_hidden_states=text).sample


def same(made: torch.Tensor, wanted: torch.Tensor) -> None:
    """Of the same weights: on some CPUs the last bits of a product depend on where in memory they begin."""
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0.0)
