"""Adapter-only weights for the built-in model."""

from __future__ import annotations

import json

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from vidaccel import AutoencoderDCV, demo
from vidaccel.pipelines.deep_compression.adapted import retarget
from vidaccel.pipelines.deep_compression.adapter_folder import FACTS_FILE, FULL_FILE

TINY = {"latent_channels": 8, "block_out_channels": (8, 8, 16, 16), "layers_per_block": (0, 1, 1, 1), "chunk_size": 8}


def write_adapter(folder, in_channels: int = 8, lora: bool = True, channels: int = 8, **facts):
    """An adapter to the built-in model with random numbers; returns the transformer it stands for, the LoRA merged."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_pretrained(demo.path(), subfolder="transformer", dtype=torch.float32)
    retarget(transformer, in_channels, channels)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
    folder.mkdir(parents=True)
    full = {n: p.detach() for n, p in transformer.named_parameters() if n.startswith(("patch_embedding.", "proj_out."))}
    save_file(full, folder / FULL_FILE)
    if lora:
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]))
        for name, parameter in transformer.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        layers = get_peft_model_state_dict(transformer)
        metadata = transformer.peft_config["default"].to_dict()
        WanPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
        transformer.fuse_lora()
        transformer.unload_lora()
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}
    stated = {"base": "demo", "autoencoder": "vae", "lora": lora, "transformer": config, **facts}
    (folder / FACTS_FILE).write_text(json.dumps(stated))
    AutoencoderDCV(**TINY).save_pretrained(folder / "vae")
    return transformer
