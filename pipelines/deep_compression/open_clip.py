"""The image encoder of Wan's image-to-video models: OpenCLIP's ViT-H/14 as Wan publishes it, for transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...autoencoders.checkpoint_file import CheckpointError, read_file

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

_OUTER = {
    "visual.patch_embedding.weight": "embeddings.patch_embedding.weight",
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.pre_norm.weight": "pre_layrnorm.weight",
    "visual.pre_norm.bias": "pre_layrnorm.bias",
    "visual.post_norm.weight": "post_layernorm.weight",
    "visual.post_norm.bias": "post_layernorm.bias",
}
_INNER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_BLOCK = re.compile(r"visual\.transformer\.(\d+)\.(.+)\.(weight|bias)")
_QKV = ("q_proj", "k_proj", "v_proj")


def vision_state_dict(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of the vision half under the names of `transformers.CLIPVisionModel`, without "vision_model.".

    Wan reads the states before the last layer, so the projection behind it ("visual.head") is left out.

    Raises:
        CheckpointError: a parameter of the vision half that is not known.
    """
    state: dict[str, torch.Tensor] = {}
    for name, value in published.items():
        if not name.startswith("visual.") or name == "visual.head":
            continue
        if name in _OUTER:
            flat = name in ("visual.cls_embedding", "visual.pos_embedding")
            state[_OUTER[name]] = value.reshape(-1, value.shape[-1]).squeeze(0) if flat else value
            continue
        match = _BLOCK.fullmatch(name)
        if match and match[2] == "attn.to_qkv":
            for part, piece in zip(_QKV, value.chunk(3), strict=True):
                state[f"encoder.layers.{match[1]}.self_attn.{part}.{match[3]}"] = piece.contiguous()
        elif match and match[2] in _INNER:
            state[f"encoder.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"] = value
        else:
            raise CheckpointError(f"The CLIP checkpoint has a parameter that is not known: {name}.")
    return state


def build_image_encoder(state: dict[str, torch.Tensor], head_dim: int = 80) -> CLIPVisionModel:
    """A `CLIPVisionModel` with these parameters; sizes are read from them.

    Args:
        state: from `vision_state_dict`.
        head_dim: channels of an attention head; 80 in ViT-H/14.

    Raises:
        CheckpointError: parameters are missing.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    try:
        patches, positions = state["embeddings.patch_embedding.weight"], state["embeddings.position_embedding.weight"]
        hidden = patches.shape[0]
        config = CLIPVisionConfig(
            hidden_size=hidden,
            intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers.")),
            num_attention_heads=hidden // head_dim,
            num_channels=patches.shape[1],
            patch_size=patches.shape[2],
            image_size=round((positions.shape[0] - 1) ** 0.5) * patches.shape[2],
            hidden_act="gelu",
        )
    except KeyError as error:
        raise CheckpointError(f"The CLIP checkpoint lacks the parameter that becomes {error.args[0]}.") from error
    model = CLIPVisionModel(config)
    prefix = next(iter(model.state_dict())).startswith("vision_model.")
    named = {f"vision_model.{k}" if prefix else k: v for k, v in state.items()}
    try:
        missing, unknown = model.load_state_dict(named, strict=False, assign=True)
    except RuntimeError as error:  # shapes, one a line behind the first
        raise CheckpointError(f"The CLIP checkpoint does not fit: {str(error).splitlines()[-1].strip()}") from error
    missing = [name for name in missing if not name.endswith("position_ids")]
    if missing or unknown:
        raise CheckpointError(f"The CLIP checkpoint does not fit: {', '.join((missing + unknown)[:3])}.")
    return model.eval()


def convert_image_encoder(path: Path, folder: Path) -> None:
    """Write `image_encoder/` and `image_processor/` into `folder` from Wan's CLIP `.pth`.

    Raises:
        CheckpointError: a file that cannot be read or does not fit.
    """
    from transformers import CLIPImageProcessor

    published = read_file(path)
    if not isinstance(published, dict):
        raise CheckpointError(f"{path} holds a {type(published).__name__}, not parameters by name.")
    model = build_image_encoder(vision_state_dict(published))
    model.save_pretrained(folder / "image_encoder")
    size = model.config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder / "image_processor")
