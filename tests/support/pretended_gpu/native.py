"""ComfyUI's native models on a pretended GPU, loaded and sampled as ComfyUI does it."""

from __future__ import annotations

from typing import Any

import torch
from comfy_models import MODELS, build, comfy, missing, sample

from vidaccel import Tangent
from vidaccel.nodes import vsa_nodes
from vidaccel.nodes.native.patch import sparsify

from . import pretended_gpu

METHOD = Tangent(density=0.95, q_clusters=3, k_clusters=4, probe=True, init_iterations=2)
# Their number of tokens is data.
DYNAMIC = {"ltxv_guide", "ltxav_guide"}


def names() -> list[str]:
    """Of all models that this ComfyUI has."""
    return [name for name in MODELS if name not in DYNAMIC and not missing(MODELS[name])]


def run(names: list[str], steps: int = 4) -> list[dict[str, Any]]:
    """A sampling of each, sparse after its first step.

    Returns:
        `name`, `loaded`: where the model was when it was sampled with, and what `PretendedGPU.seen` gives, of which
        `waits` of vidaccel's.
    """
    return [_sampled(name, steps) for name in names]


def _sampled(name: str, steps: int) -> dict[str, Any]:
    with pretended_gpu() as gpu:
        _choose_gpu()
        model = build(MODELS[name])
        model.load_device, model.offload_device = torch.device("cuda", 0), torch.device("cpu")
        sparse, _ = sparsify(model, lambda layout: METHOD, name="rehearsed", settings={}, dense_start_percent=0.25)
        sample(sparse, MODELS[name], steps=steps)
        loaded = next(model.model.diffusion_model.parameters()).device
        seen = gpu.seen()
        return {"name": name, "loaded": str(loaded), **seen, "waits": [x for x in seen["waits"] if ".py" in x]}


def run_vsa(file: str, dtype: str) -> dict[str, Any]:
    """A sampling of a FastWan in one file, by *Load Diffusion Model* and *Apply VSA*.

    Args:
        file: with gates. dtype: that the weights are loaded in, by its name in torch.

    Returns:
        What `PretendedGPU.seen` gives.
    """
    import comfy.samplers  # `comfy_models` found it
    import comfy.sd

    noise, text = torch.randn(1, 16, 7, 12, 20), [[torch.randn(1, 7, 4096), {}]]
    node = vsa_nodes.VidaccelApplyVSA
    inputs = {given.id: given.default for given in node.define_schema().inputs if hasattr(given, "default")}
    with pretended_gpu() as gpu:
        _choose_gpu()
        model = comfy.sd.load_diffusion_model(file, model_options={"dtype": getattr(torch, dtype)})
        model, _ = node.execute(model, **inputs | {"path": file, "min_tokens": 0}).result
        sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.757, 0.522, 0.0])
        with torch.inference_mode():
            latent = torch.zeros_like(noise)
            comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, text, text, latent, disable_pbar=True)
        return gpu.seen()


def _choose_gpu() -> None:
    management = comfy.model_management
    management.cpu_state, management.vram_state = management.CPUState.GPU, management.VRAMState.NORMAL_VRAM
    # It makes a device of a number alone, which a torch without CUDA takes for none.
    management.get_torch_device = lambda: torch.device("cuda", 0)
