"""DC-AE-V and DC-VideoGen at tiny sizes: real classes, random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from tiny_wan import TRANSFORMER, make_scheduler

from vidaccel.autoencoders import AutoencoderDCV
from vidaccel.autoencoders.convert import load_published

DATA = Path(__file__).resolve().parents[1] / "data"
GOLDEN = DATA / "dc_ae_v_f32t4_tiny.safetensors"

# 4x in space, 4x in time; chunks of 8 frames, 2 latent frames.
SMALL = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": (0, 1, 1, 1),
    "chunk_size": 8,
    "scaling_factor": 0.5,
}
# 32x in space.
DEEP = {**SMALL, "block_out_channels": (4,) * 7, "layers_per_block": (0, 1, 0, 0, 0, 0, 1)}


def make_autoencoder(seed: int = 0, **changes) -> AutoencoderDCV:
    torch.manual_seed(seed)
    return AutoencoderDCV(**{**SMALL, **changes}).eval().requires_grad_(False)


def make_video(frames: int, height: int = 16, width: int = 16, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Noise `[B, 3, T, H, W]` in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


def make_latents(frames: int, height: int = 4, width: int = 4, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, SMALL["latent_channels"], frames, height, width, generator=generator)


def load_golden(**changes) -> tuple[AutoencoderDCV, dict[str, torch.Tensor]]:
    """The reference's weights in `AutoencoderDCV`, and its input, latent and reconstruction."""
    import tempfile

    from safetensors.torch import load_file, save_file

    tensors = load_file(GOLDEN)
    weights = {name: tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_file(weights, file)
        model = load_published(file, **{"chunk_size": 8, **changes})
    return model.requires_grad_(False), tensors


def make_dc_transformer(image: bool = False, seed: int = 0, **changes) -> WanTransformer3DModel:
    """A Wan transformer for the latents of `DEEP`: patch 1, 4 channels; for image to video 4 + 4 + 4."""
    torch.manual_seed(seed)
    config = {**TRANSFORMER, "patch_size": (1, 1, 1), "num_layers": 2, "in_channels": 12 if image else 4}
    return WanTransformer3DModel(**{**config, **changes}).eval()


def make_dc_pipe(cls: type, **components):
    image = "ImageToVideo" in cls.__name__
    parts = {"transformer": make_dc_transformer(image), "scheduler": make_scheduler(), "vae": make_autoencoder(**DEEP)}
    pipe = cls(**{"tokenizer": None, "text_encoder": None, **parts, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_picture(height: int = 50, width: int = 60, seed: int = 0) -> object:
    """A PIL image of noise."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def generate_dc(pipe, frames: int = 8, height: int = 32, width: int = 64, prompts: int = 1, seed: int = 0, **more):
    """A video, or what `output_type` says; prompts are embeddings, and for image to video the picture is noise."""
    if "ImageToVideo" in type(pipe).__name__:
        more = {"image": make_picture(), **more}
    embeds = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(9)).expand(-1, prompts, -1, -1)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed), "output_type": "pt", **more}
    if "prompt" not in more:
        options = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], **options}
    return pipe(height=height, width=width, num_frames=frames, **options).frames


def seen_by_transformer(pipe, **more) -> list[torch.Tensor]:
    """What the transformer is given, call by call."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    generate_dc(pipe, output_type="latent", **more)
    hook.remove()
    return seen


def make_text() -> dict[str, object]:
    """A tokenizer of letters and a text encoder, as components of a pipeline."""
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0), ("▁", -3.0), *((letter, -3.0) for letter in letters)]
    torch.manual_seed(1)
    config = UMT5Config(vocab_size=len(vocab), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    return {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(config).eval().requires_grad_(False)}


def make_clip() -> dict[str, object]:
    """An image encoder of 80 channels, one attention head as Wan's, and its preprocessing."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    size = {"hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1}
    config = CLIPVisionConfig(**size, image_size=28, patch_size=14, hidden_act="gelu")
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    encoder = CLIPVisionModel(config).eval().requires_grad_(False)
    return {"image_encoder": encoder, "image_processor": processor}


def published_clip(encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of a CLIP vision model as in Wan's `.pth`, which also holds a projection and the text half."""
    own = {name.removeprefix("vision_model."): value for name, value in encoder.state_dict().items()}
    names = {
        "visual.patch_embedding.weight": own["embeddings.patch_embedding.weight"],
        "visual.cls_embedding": own["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": own["embeddings.position_embedding.weight"][None],
    }
    for theirs, ours in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm")):
        names |= {f"visual.{theirs}.{kind}": own[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    inner = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    inner |= {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    for layer in range(encoder.config.num_hidden_layers):
        theirs, ours = f"visual.transformer.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            names |= {f"{theirs}.{new}.{kind}": own[f"{ours}.{old}.{kind}"] for new, old in inner.items()}
            parts = [own[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            names[f"{theirs}.attn.to_qkv.{kind}"] = torch.cat(parts)
    hidden = encoder.config.hidden_size
    extra = {"visual.head": torch.zeros(hidden, 8), "log_scale": torch.ones(()), "textual.x": torch.ones(1)}
    return {**{name: value.clone() for name, value in names.items()}, **extra}


def write_published(folder: Path, parts: str = "t2v i2v text vae clip", vae_name: str = "dc-ae-v-1.0-f32t4c4") -> Path:
    """A folder in the layout in which DC-VideoGen is published.

    Args:
        parts: "t2v", "i2v" in folders of their own, or "transformer" (text to video) or "transformer-image" in
            `transformer/`; "text", "vae", "clip".
    """
    import json

    from vidaccel.autoencoders.convert import to_published

    folder.mkdir(parents=True)
    names = {"t2v": "transformer_t2v", "i2v": "transformer_i2v"}
    for part in parts.split():
        if part in ("t2v", "i2v", "transformer", "transformer-image"):
            image = part in ("i2v", "transformer-image")
            model = make_dc_transformer(image, image_dim=80 if image else None)
            model.save_pretrained(folder / names.get(part, "transformer"))
        elif part == "text":
            text = make_text()
            text["text_encoder"].save_pretrained(folder / "text_encoder")
            text["tokenizer"].save_pretrained(folder / "tokenizer")
            file = folder / "tokenizer" / "tokenizer_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": "T5TokenizerFast"}))
            make_scheduler().save_pretrained(folder / "scheduler")
        elif part == "vae":
            model = make_autoencoder(**{**DEEP, "chunk_size": 40, "scaling_factor": 1.0})
            state = to_published(model.state_dict(), model.config)
            torch.save({"ema_model_state_dict": {"ema": state}}, folder / f"{vae_name}.pt")
        elif part == "clip":
            file = folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
            torch.save(published_clip(make_clip()["image_encoder"]), file)
    return folder
