"""Wan: text-to-video and image-to-video transformers of diffusers, moved to `AutoencoderDCV`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import nn

from ...autoencoders import AutoencoderDCV
from ...demo.text import use_padded_cross_attention
from ...pipelines.deep_compression.adapted import new_embedding, retarget
from ...pipelines.deep_compression.image_to_video import DCVideoGenImageToVideoPipeline
from ...pipelines.deep_compression.text_to_video import DCVideoGenPipeline
from ..config import ConfigError
from .base import Backbone, told_guidance
from .folders import load_autoencoder, load_part, read_config, write_pipeline
from .wan_encoding import WanEncoder
from .wan_family import WanFamily, base_pipeline

LORA_TARGETS = (
    r"blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"
    r"|condition_embedder\.(time_embedder\.linear_[12]|time_proj)"
)
"""Self-attention, feed-forward, time embedding and projection; neither cross-attention nor the text embedding."""


class WanBackbone(WanFamily, Backbone):
    """A Wan model in diffusers' layout.

    Args:
        base: folder or hub id of the pipeline.
        autoencoder: folder or hub id of the `AutoencoderDCV`.
        dtype: of the frozen weights.
        device: where encoders and teacher run.
        merge_text_padding: let one position stand for the padding of a prompt: the same result, and faster where
            prompts are short. Text to video only.
        autoencoder_dtype: in which the new autoencoder encodes; it is saved as it was.
        guidance: must be None: Wan is not told any.
        autoencoder_tiling: both autoencoders encode large clips in tiles.

    Raises:
        ConfigError: something is missing or does not fit together; the message says what fits.
    """

    trained_fully = ("patch_embedding.", "proj_out.")
    lora_targets = LORA_TARGETS

    def __init__(
        self,
        base: str,
        autoencoder: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        merge_text_padding: bool = False,
        autoencoder_dtype: torch.dtype = torch.float32,
        guidance: float | None = None,
        autoencoder_tiling: bool = False,
    ) -> None:
        self.base, self.autoencoder_path = base, autoencoder
        self.dtype, self.device = dtype, torch.device(device)
        self.config = read_config(WanTransformer3DModel, base, "transformer")
        told_guidance(base, self.config, guidance, None)
        vae = read_config(AutoencoderKLWan, base, "vae")
        new = read_config(AutoencoderDCV, autoencoder)
        if new.get("_class_name") != "AutoencoderDCV":
            raise ConfigError(
                f"model.autoencoder: {autoencoder} is a {new.get('_class_name')}, but a Wan model is adapted to an "
                "AutoencoderDCV, which is for videos. (An AutoencoderDC is for images: FLUX and SANA.)"
            )
        if new.get("pad_frames"):
            raise ConfigError(
                f"model.autoencoder: {autoencoder} has pad_frames {new['pad_frames']}; ae_adapt takes one with 0, "
                "whose latent frames stand for 4 pixel frames each."
            )
        self.latent_channels = int(new["latent_channels"])
        self.image = _check_fit(base, self.config, vae, WanPipeline.load_config(base))
        stride = vae.get("scale_factor_spatial", 8) * self.config["patch_size"][1]
        self.factor = 2 ** (len(new["block_out_channels"]) - 2)
        if self.factor % stride:
            raise ConfigError(
                f"a token of {base} is {stride} pixels wide, and one of {autoencoder} {self.factor}: the second must "
                "be a multiple of the first."
            )
        if merge_text_padding and self.image:
            raise ConfigError("model.merge_text_padding is for text-to-video models: set it to false.")
        self.merge_text_padding = merge_text_padding
        self.autoencoder = load_autoencoder(AutoencoderDCV, autoencoder, "model.autoencoder", dtype=autoencoder_dtype)
        self.autoencoder.requires_grad_(False).eval()
        self.autoencoder.enable_slicing()  # the same result, and a batch takes no more memory than a clip
        self.autoencoder_tiling = autoencoder_tiling
        if autoencoder_tiling:
            self.autoencoder.enable_tiling()

    @property
    def in_channels(self) -> int:
        """Channels that the new embedder takes: latents, and for image to video 4 of the mask and the image's."""
        return 2 * self.latent_channels + 4 if self.image else self.latent_channels

    def check_size(self, frames: int, height: int, width: int) -> str | None:
        if frames % 4:
            return f"clips of {frames} frames do not fit: their number must be a multiple of 4."
        if height % self.factor or width % self.factor:
            return f"{height}x{width} must be a multiple of {self.factor}, the autoencoder's factor."
        return None

    # -- modules -------------------------------------------------------------------------------------------------------

    def student(self) -> WanTransformer3DModel:
        transformer = WanTransformer3DModel.from_pretrained(self.base, subfolder="transformer", dtype=self.dtype)
        retarget(transformer, self.in_channels, self.latent_channels)
        # They are trained, so they stay float32 whatever the others are.
        transformer.patch_embedding.float()
        transformer.proj_out.float()
        if self.merge_text_padding:
            use_padded_cross_attention(transformer)
        return transformer.requires_grad_(False)

    def skeleton(self) -> nn.Module:
        with init_empty_weights():
            return WanTransformer3DModel.from_config(self.config)

    def aligner(self) -> Aligner:
        return Aligner(new_embedding(self.in_channels, self.inner), "latents", "condition")

    def teacher(self) -> Aligner:
        embedding = load_part(WanTransformer3DModel, self.base, "patch_embedding", self.dtype).float()
        return Aligner(embedding, "teacher", "teacher_condition").requires_grad_(False).to(self.device)

    # -- encoding ------------------------------------------------------------------------------------------------------

    def parts(self, align: bool) -> tuple[str, ...]:
        if align:
            return ("latents", "teacher", *(("condition", "teacher_condition") if self.image else ()))
        embeds = ("image_embeds",) if self.image and self.config.get("image_dim") is not None else ()
        return ("latents", *(("condition",) if self.image else ()), *embeds)

    def encoder(self, parts: Sequence[str]) -> WanEncoder:
        tiled = self.autoencoder_tiling
        return WanEncoder(self.base, self.autoencoder, tuple(parts), self.device, self.fingerprints, tiled)

    # -- results -------------------------------------------------------------------------------------------------------

    def sampler(self, transformer: nn.Module) -> DCVideoGenPipeline | DCVideoGenImageToVideoPipeline:
        components = {"tokenizer": None, "text_encoder": None, "vae": self.autoencoder.to(self.device)}
        components |= {
            "scheduler": base_pipeline(self.base, self.image, ("scheduler",)).scheduler,
            "transformer": transformer,
        }
        if self.image and self.config.get("image_dim") is not None:
            eye = base_pipeline(self.base, True, ("image_encoder", "image_processor"))
            components |= {"image_encoder": eye.image_encoder.to(self.device), "image_processor": eye.image_processor}
        return (DCVideoGenImageToVideoPipeline if self.image else DCVideoGenPipeline)(**components)

    def save(self, transformer: nn.Module, folder: Path) -> None:
        shared = ("tokenizer", "text_encoder", *(("image_encoder", "image_processor") if self.image else ()))
        cls = DCVideoGenImageToVideoPipeline if self.image else DCVideoGenPipeline
        pipe = cls(
            **dict.fromkeys(shared),
            scheduler=base_pipeline(self.base, self.image, ("scheduler",)).scheduler,
            vae=self.autoencoder,
            transformer=transformer.to("cpu"),
        )
        write_pipeline(pipe, folder, self.base, shared, self.autoencoder_path)


class Aligner(nn.Module):
    """A patch embedding that takes its parts of a batch.

    Args:
        embedding: the convolution.
        latents, condition: names of the parts; the second is used where the batch has it.
    """

    def __init__(self, embedding: nn.Conv3d, latents: str, condition: str) -> None:
        super().__init__()
        self.patch_embedding = embedding
        self.names = (latents, condition)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Tokens `[B, D, T, H, W]`."""
        return self.patch_embedding(torch.cat([batch[name] for name in self.names if name in batch], dim=1))


def _check_fit(base: str, config: Mapping, vae: Mapping, index: Mapping) -> bool:
    """Whether the model is image to video.

    Raises:
        ConfigError: a model that cannot be adapted.
    """
    if config.get("_class_name") != "WanTransformer3DModel":
        raise ConfigError(
            f"model.base: {base} has a {config.get('_class_name')}; ae_adapt takes WanTransformer3DModel."
        )
    two = (index.get("transformer_2") or [None])[0] is not None
    if index.get("expand_timesteps") or two:
        what = "two transformers, and ae_adapt trains one"
        if not two:
            what = "a timestep for each token (expand_timesteps), which DCVideoGenPipeline does not do"
        raise ConfigError(f"model.base: {base} is a Wan 2.2 model with {what}: give a Wan 2.1 model.")
    z, given = int(vae.get("z_dim", 16)), int(config["in_channels"])
    if given not in (z, 2 * z + 4) or int(config["out_channels"]) != z:
        raise ConfigError(
            f"model.base: the patch embedding of {base} takes {given} channels and its head makes "
            f"{config['out_channels']}, but with its autoencoder of {z} latent channels a text-to-video model takes "
            f"{z} and makes {z}, an image-to-video model takes {2 * z + 4} and makes {z}. Models with other inputs "
            "(VACE, control, first and last frame) do not fit."
        )
    if config.get("pos_embed_seq_len") is not None:
        raise ConfigError(
            f"model.base: {base} is a model of first and last frame (pos_embed_seq_len is "
            f"{config['pos_embed_seq_len']}): give one of text or first frame to video."
        )
    patch = tuple(config["patch_size"])
    if patch[0] != 1 or patch[1] != patch[2] or not math.log2(patch[1]).is_integer():
        raise ConfigError(f"model.base: {base} has patches of {patch}; ae_adapt takes (1, p, p), p a power of 2.")
    return given != z
