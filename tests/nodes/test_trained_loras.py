"""Files of the recipe `lora` in ComfyUI's own loader, onto ComfyUI's own models."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import COMFYUI, PYTHON, WHY_SKIPPED
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from families import cogvideo, hunyuan, ltx
from tiny_images import flux_transformer

from vidaccel.lora.adapters.adapter import add_lora, layers_named
from vidaccel.lora.adapters.lora_file import save_lora
from vidaccel.lora.backbones.base import OwnModel
from vidaccel.lora.backbones.cogvideox_own import CogVideoXModel
from vidaccel.lora.backbones.flux import FluxModel
from vidaccel.lora.backbones.hunyuan_own import HunyuanVideoModel, native_name, native_rows
from vidaccel.lora.backbones.ltx_own import LTXModel
from vidaccel.lora.backbones.wan_own import WanModel

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


LTX = {"image_model": "ltxv", "in_channels": 8, "cross_attention_dim": 32, "attention_head_dim": 16}
LTX |= {"num_attention_heads": 2, "caption_channels": 16, "num_layers": 1}
COGVIDEOX = {"image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 8}
COGVIDEOX |= {
    "use_rotary_positional_embeddings": True,
    "text_embed_dim": 16,
    "num_layers": 1,
    "in_channels": 4,
    "out_channels": 4,
}
HUNYUAN = {"image_model": "hunyuan_video", "in_channels": 4, "out_channels": 4, "patch_size": [1, 2, 2]}
HUNYUAN |= {"vec_in_dim": 8, "axes_dim": [4, 6, 6], "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 4.0}
HUNYUAN |= {"num_heads": 2, "depth": 1, "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "byt5": False}
HUNYUAN |= {"guidance_embed": True, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None}
HUNYUAN |= {"meanflow_sum": False}


@dataclass(frozen=True)
class Case:
    """A tiny model of diffusers, and the same of ComfyUI.

    Args:
        make: the first.
        family: of the training.
        config: name of ComfyUI's class.
        unet: its settings.
        outside: layers that may get a LoRA beside the usual ones.
        named: the name of a layer in the file that ComfyUI reads, of a model without weights; None for `file_name`.
        rows: of layers that are one in it.
        alike: each layer is one of ComfyUI's, too.
    """

    make: Callable[[], Any]
    family: type[OwnModel]
    config: str
    unet: dict[str, Any] = field(hash=False)
    outside: tuple[str, ...] = ()
    named: Callable[[str], str] | None = None
    rows: Callable[[str], Any] = lambda layer: None
    alike: bool = True


CASES = {
    "wan text": Case(wan, WanModel, "WAN21_T2V", {**WAN, "model_type": "t2v", "in_dim": 8}, OUTSIDE),
    "wan image": Case(
        lambda: wan(in_channels=20, image_dim=1280, added_kv_proj_dim=24),
        WanModel,
        "WAN21_I2V",
        {**WAN, "model_type": "i2v", "in_dim": 20},
        ("add_k_proj", "add_v_proj", "image_embedder.ff.net.0.proj", "image_embedder.ff.net.2"),
    ),
    "flux": Case(lambda: flux_transformer(in_channels=16), FluxModel, "Flux", FLUX, alike=False),
    "ltx": Case(lambda: ltx.parts()["transformer"], LTXModel, "LTXV", LTX),
    "cogvideox": Case(
        lambda: CogVideoXTransformer3DModel(**cogvideo.TRANSFORMER),
        CogVideoXModel,
        "CogVideoX_T2V",
        COGVIDEOX,
        named=lambda layer: str(object.__new__(CogVideoXModel).comfyui_name(layer)),
    ),
    "hunyuan": Case(
        lambda: HunyuanVideoTransformer3DModel(**hunyuan.TRANSFORMER),
        HunyuanVideoModel,
        "HunyuanVideo",
        HUNYUAN,
        named=lambda layer: f"diffusion_model.{native_name(layer)}",  # as at the width of published models
        rows=lambda layer: native_rows(layer, 32, 128),
        alike=False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_comfyui_takes_every_matrix(tmp_path, case):
    """Of all layers that a family's LoRA may have; the patched weights are the product, whatever alpha was."""
    made = CASES[case]
    transformer, family = made.make(), made.family
    usual = layers_named(transformer, (*family.lora_targets, *made.outside), "lora.targets")
    layers = [layer for layer in usual if layer.startswith(family.lora_within)]
    add_lora(transformer, layers, 2, 6.0)
    weights = {n: torch.randn_like(p) for n, p in transformer.named_parameters() if ".lora_" in n}
    named = made.named or family.file_name.__get__(object.__new__(family))
    file = save_lora(weights, tmp_path / "a.safetensors", named, 3.0, {}, rows_of=made.rows)
    command = [PYTHON, str(SCRIPT), str(file), made.config, json.dumps(made.unet)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=COMFYUI, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert not said["log"]
    assert said["of"] == pytest.approx(1, rel=1e-3)
    if made.alike:  # else q, k and v are parts of one matrix
        assert len(said["layers"]) == len(layers)
