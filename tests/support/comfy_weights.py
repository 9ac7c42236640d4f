"""Writes small random weights for ComfyUI's loaders: `python comfy_weights.py FOLDER`, with ComfyUI's own Python.

The models are ComfyUI's classes, small, in files from which its loaders recognise the family.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ["COMFYUI_PATH"])

import comfy.options
from comfy.cli_args import args

args.cpu = True

import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.hunyuan_video.model import HunyuanVideo, HunyuanVideoParams  # noqa: E402
from comfy.ldm.wan.model import WanModel  # noqa: E402
from comfy.ldm.wan.vae import WanVAE  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

MADE = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}
WAN = {
    "model_type": "t2v",
    "patch_size": (1, 2, 2),
    "dim": 256,
    "ffn_dim": 512,
    "freq_dim": 256,
    "text_dim": 4096,
    "out_dim": 16,
    "num_heads": 2,
    "num_layers": 2,
}
HUNYUAN = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": 768,
    "axes_dim": [16, 56, 56],
    "context_in_dim": 4096,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": True,
}


def save(module: torch.nn.Module, path: Path) -> None:
    """Fill a model with random numbers of unit gain and write it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "gamma" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif ("norm" in name and name.endswith(("weight", "scale"))) or name.endswith("gamma"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)


def add_gates(source: Path, target: Path) -> None:
    """The same model as `vidaccel convert fastwan` writes one, with random gates."""
    width = WAN["dim"]
    tensors = {f"model.diffusion_model.{name}": value for name, value in load_file(source).items()}
    for layer in range(WAN["num_layers"]):
        gate = f"vsa.blocks.{layer}.to_gate_compress"
        tensors |= {f"{gate}.weight": torch.randn(width, width) * width**-0.5, f"{gate}.bias": torch.zeros(width)}
    save_file(tensors, target)


def main(folder: Path) -> None:
    """Write all of them below a `models` folder."""
    unets = folder / "diffusion_models"
    save(WanModel(in_dim=16, **WAN, **MADE), unets / "tiny_wan.safetensors")
    add_gates(unets / "tiny_wan.safetensors", unets / "tiny_fastwan.safetensors")
    # Wan 2.2's image-to-video has no image embedding: 16 channels of noise, 4 of mask, 16 of the picture.
    save(WanModel(in_dim=36, **WAN, **MADE), unets / "tiny_wan_i2v.safetensors")
    # Later versions have fields for later models, which count as absent.
    absent = {f.name: None if "dim" in f.name else False for f in dataclasses.fields(HunyuanVideoParams)}
    save(HunyuanVideo(**{**absent, **HUNYUAN}, **MADE), unets / "tiny_hunyuan.safetensors")
    vae = WanVAE(
        dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    save(vae, folder / "vae" / "tiny_wan_vae.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
