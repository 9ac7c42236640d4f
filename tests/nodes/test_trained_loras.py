"""Files of the recipe `lora` in ComfyUI's own loader, onto ComfyUI's own models."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from comfy_server import COMFYUI, PYTHON, WHY_SKIPPED
from diffusers import WanTransformer3DModel
from tiny_images import flux_transformer

from vidaccel.lora.adapter import add_lora, layers_named
from vidaccel.lora.backbones.flux import FluxModel
from vidaccel.lora.backbones.wan_own import WanModel
from vidaccel.lora.lora_file import save_lora

pytestmark = pytest.mark.skipif(not COMFYUI, reason=WHY_SKIPPED)

SCRIPT = Path(__file__).parents[1] / "support" / "comfy_lora_keys.py"
WAN = {"image_model": "wan2.1", "dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "freq_dim": 16}
WAN |= {"text_dim": 64, "out_dim": 8, "patch_size": [1, 2, 2]}
OUTSIDE = ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj", "text_embedder.linear_1", "proj_out")
FLUX = {"image_model": "flux", "in_channels": 4, "vec_in_dim": 10, "context_in_dim": 12, "hidden_size": 32}
FLUX |= {"mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 4, 8], "theta": 10000}
FLUX |= {"patch_size": 2, "out_channels": 4, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": []}


def wan(**changes) -> WanTransformer3DModel:
    size = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 8, "out_channels": 8, "text_dim": 64}
    size |= {"freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    return WanTransformer3DModel(**size | changes)


CASES = {
    "wan text": (
        wan,
        WanModel,
        (*WanModel.lora_targets, *OUTSIDE),
        "WAN21_T2V",
        {**WAN, "model_type": "t2v", "in_dim": 8},
    ),
    "wan image": (
        lambda: wan(in_channels=20, image_dim=1280, added_kv_proj_dim=24),
        WanModel,
        (*WanModel.lora_targets, "add_k_proj", "add_v_proj", "image_embedder.ff.net.0.proj", "image_embedder.ff.net.2"),
        "WAN21_I2V",
        {**WAN, "model_type": "i2v", "in_dim": 20},
    ),
    "flux": (lambda: flux_transformer(in_channels=16), FluxModel, FluxModel.lora_targets, "Flux", FLUX),
}


@pytest.mark.parametrize("case", CASES)
def test_comfyui_takes_every_matrix(tmp_path, case):
    """Of all layers that a family's LoRA may have; the patched weights are the product, whatever alpha was."""
    make, family, targets, name, settings = CASES[case]
    transformer = make()
    layers = layers_named(transformer, targets, "lora.targets")
    add_lora(transformer, layers, 2, 6.0)
    weights = {n: torch.randn_like(p) for n, p in transformer.named_parameters() if ".lora_" in n}
    file = save_lora(weights, tmp_path / "a.safetensors", family.file_name.__get__(object.__new__(family)), 3.0, {})
    command = [PYTHON, str(SCRIPT), str(file), name, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=COMFYUI, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert not said["log"]
    assert said["of"] == pytest.approx(1, rel=1e-3)
    if case != "flux":  # there q, k and v are parts of one matrix
        assert len(said["layers"]) == len(layers)
