"""A FastWan model as FastVideo publishes it, as small as ComfyUI's loader reads one.

It takes heads to have 128 channels, and text 4096.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_wan import make_transformer
from vsa_models import gates

SHAPE = {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
LAYERS, WIDTH = 2, 256


def write_fastwan(folder: Path, *, shards: int = 1, gated: bool = True, **changes) -> Path:
    """Two layers of random weights and gates in bfloat16, in a folder that names FastVideo's pipeline.

    Args:
        shards: files that they are in. gated: whether it has gates.
        changes: of the transformer's config.
    """
    transformer = make_transformer(num_layers=LAYERS, **SHAPE | changes)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(2.0)  # so large that the attention shows in the result
    (folder / "transformer").mkdir(parents=True)
    transformer.save_config(folder / "transformer")
    state = transformer.state_dict() | (gates(transformer) if gated else {})
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    stem, names = "diffusion_pytorch_model", sorted(state)
    files = (
        [f"{stem}-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
        if shards > 1
        else [f"{stem}.safetensors"]
    )
    for number, file in enumerate(files):
        save_file(
            {name: state[name] for name in names[number::shards]}, folder / "transformer" / file, {"format": "pt"}
        )
    if shards > 1:
        places = {name: files[place % shards] for place, name in enumerate(names)}
        index = folder / "transformer" / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    index = {"_class_name": "WanDMDPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
