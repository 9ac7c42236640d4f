"""Wan as it is: 2.1 and 2.2 of every size, text and image to video, with the autoencoder it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from torch import nn

from ...attention.layout import VideoLayout
from ...demo.text import use_padded_cross_attention
from ..config import ConfigError
from .base import ModelOptions, OwnModel, told_guidance
from .folders import read_config, write_pipeline
from .wan_encoding import OwnWanEncoder
from .wan_family import WanFamily, base_pipeline

STAGES = {"high_noise": "transformer", "low_noise": "transformer_2"}
"""Of Wan 2.2 14B: stage -> the component of the pipeline that does it."""

_FILE_NAMES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
_FILE_PARTS = {
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_q": ".q",
    ".to_k": ".k",
    ".to_v": ".v",
    ".to_out.0": ".o",
    ".add_k_proj": ".k_img",
    ".add_v_proj": ".v_img",
    ".ffn.net.0.proj": ".ffn.0",
    ".ffn.net.2": ".ffn.2",
}
"""diffusers' names of layers -> Wan's own, which ComfyUI knows and diffusers translates."""


class OwnWan(WanFamily, OwnModel):
    """What Wan models have in common that are trained as they are: layers that may get a LoRA, and their names."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    self_attention = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")

    def __init__(self, base: str, options: ModelOptions) -> None:
        self.base, self.dtype = base, options.dtype
        self.autoencoder_dtype, self.autoencoder_tiling = options.autoencoder_dtype, options.autoencoder_tiling
        self.device, self.merge_text_padding = torch.device(options.device), options.merge_text_padding

    def check_options(self, options: ModelOptions) -> None:
        """Raise ConfigError for what no Wan model is told, and for padding that cannot be merged; needs `config`."""
        told_guidance(self.base, self.config, options.guidance, None)
        if options.merge_text_padding and self.config.get("image_dim") is not None:
            raise ConfigError("model.merge_text_padding is for models without an image encoder: set it to false.")

    @property
    def lora_loader(self) -> Any:
        return WanPipeline

    def skeleton(self) -> nn.Module:
        with init_empty_weights():
            return WanTransformer3DModel.from_config(self.config)

    def check_layers(self, layers: Sequence[str]) -> str | None:
        if "patch_embedding" in layers:
            return "patch_embedding is a convolution, of which files of LoRAs for Wan have no name."
        if not any(layer.startswith("blocks.") for layer in layers):
            return f"{', '.join(layers)} alone is a LoRA that diffusers cannot load: add a layer of the blocks."
        return None

    def file_name(self, layer: str) -> str:
        if layer in _FILE_NAMES:
            return f"diffusion_model.{_FILE_NAMES[layer]}"
        for theirs, own in _FILE_PARTS.items():
            layer = layer.replace(theirs, own)
        return f"diffusion_model.{layer}"

    def loaded(self, transformer: nn.Module) -> nn.Module:
        """A transformer as it is trained: frozen, and with its prompts' padding merged where that is set."""
        if self.merge_text_padding:
            use_padded_cross_attention(transformer)
        return transformer.requires_grad_(False)


class WanModel(OwnWan):
    """A Wan pipeline in diffusers' layout, whose transformer (or one of its two) is trained.

    Args:
        base: folder or hub id of the pipeline.
        options: `stage` is one of `STAGES`; Wan 2.2 5B can be trained with first frames and without.
    """

    def __init__(self, base: str, options: ModelOptions) -> None:
        super().__init__(base, options)
        first_frame = options.first_frame
        self.index = WanPipeline.load_config(base)
        self.part, self.levels = stage_of(base, self.index, options.stage)
        self.config = read_config(WanTransformer3DModel, base, self.part)
        self.vae = read_config(AutoencoderKLWan, base, "vae")
        starts = _fits(base, self.config, self.vae, self.index)
        self.image = starts if first_frame is None else first_frame
        self.per_token = bool(self.index.get("expand_timesteps"))
        self.clean_first = self.image and self.per_token
        self.check_options(options)
        if self.image != starts and not self.per_token:
            kind = "starts from" if starts else "takes no"
            raise ConfigError(
                f"model.first_frame is {str(first_frame).lower()}, but {base} {kind} first frames: leave it out (it is "
                "for Wan 2.2 5B, which does both)."
            )

    @property
    def _token(self) -> int:
        """Pixels of a token's side."""
        return int(self.vae.get("scale_factor_spatial", 8)) * int(self.config["patch_size"][1])

    def check_size(self, frames: int, height: int, width: int) -> str | None:
        if (frames - 1) % 4:
            below = (frames - 1) // 4 * 4 + 1
            return f"clips of {frames} frames do not fit: Wan takes 4k + 1; give {below} or {below + 4}."
        if height % self._token or width % self._token:
            return f"{height}x{width} must be a multiple of {self._token}, the width of a token of {self.base}."
        return None

    def layout(self, frames: int, height: int, width: int) -> VideoLayout:
        return VideoLayout((frames - 1) // 4 + 1, height // self._token, width // self._token)

    def transformer(self, quantisation: Any = None) -> nn.Module:
        transformer = WanTransformer3DModel.from_pretrained(
            self.base, subfolder=self.part, dtype=self.dtype, quantization_config=quantisation
        )
        return self.loaded(transformer)

    def other_transformer(self) -> nn.Module:
        [part] = [name for name in STAGES.values() if name != self.part]
        return self.loaded(WanTransformer3DModel.from_pretrained(self.base, subfolder=part, dtype=self.dtype))

    def encoder(self) -> OwnWanEncoder:
        embeds = ("image_embeds",) if self.image and self.config.get("image_dim") is not None else ()
        # A timestep for each token marks the first frame by itself.
        condition = ("condition",) if self.image and not self.per_token else ()
        parts = ("latents", *condition, *embeds)
        tiled = self.autoencoder_tiling
        return OwnWanEncoder(self.base, parts, self.device, self.autoencoder_dtype, self.fingerprints, tiled)

    # -- the first frame of models with a timestep for each token ------------------------------------------------------

    def timestep(self, sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        told = super().timestep(sigma, latents)
        if not self.clean_first:
            return told
        patch = self.config["patch_size"]
        frames, height, width = (size // p for size, p in zip(latents.shape[2:], patch, strict=True))
        each = told[:, None, None].repeat(1, frames, height * width)
        each[:, 0] = 0
        return each.flatten(1)

    # -- results -------------------------------------------------------------------------------------------------------

    def sampler(self, transformer: nn.Module) -> WanPipeline | WanImageToVideoPipeline:
        others = [name for name in STAGES.values() if name != self.part and (self.index.get(name) or [None])[0]]
        eyes = ("image_encoder", "image_processor") if self.config.get("image_dim") is not None else ()
        pipe = base_pipeline(self.base, self.image, ("scheduler", "vae", *others, *eyes), self.dtype)
        if self.autoencoder_tiling:  # else what it encoded in tiles, it would decode whole
            pipe.vae.enable_tiling()
        pipe.to(self.device)  # before the transformer is in it, which may be spread over devices
        pipe.register_modules(**{self.part: transformer})
        return pipe

    def save(self, transformer: nn.Module, folder: Path) -> None:
        parts = [name for name, entry in self.index.items() if isinstance(entry, (list, tuple)) and entry[0]]
        pipe = base_pipeline(self.base, self.image, ("scheduler",))
        pipe.register_modules(**{self.part: transformer.to("cpu")})
        write_pipeline(pipe, folder, self.base, [name for name in parts if name not in ("scheduler", self.part)])

    def picture(self, image: torch.Tensor) -> Image.Image:
        # The image encoder's processor would divide numbers in [0, 1] by 255.
        return Image.fromarray(((image.permute(1, 2, 0).cpu() + 1) * 127.5).round().byte().numpy())


def stage_of(base: str, index: Mapping[str, Any], stage: str | None) -> tuple[str, tuple[float, float]]:
    """The component that is trained, and the noise levels that it is used for.

    Raises:
        ConfigError: a stage is missing or of no use.
    """
    two = all((index.get(name) or [None])[0] for name in STAGES.values())
    if not two:
        if stage is not None:
            raise ConfigError(
                f"model.stage is {stage}, but {base} has one transformer for all noise levels: leave it out."
            )
        return "transformer", (0.0, 1.0)
    boundary = index.get("boundary_ratio")
    if not isinstance(boundary, float) or not 0 < boundary < 1:
        raise ConfigError(
            f"model.base: {base} has two transformers, but its model_index.json has boundary_ratio {boundary}, which "
            "must say between 0 and 1 where the second takes over (Wan 2.2: 0.875 for text, 0.9 for image to video)."
        )
    if stage is None:
        raise ConfigError(
            f"model.stage is missing: {base} has two transformers, each with a LoRA of its own. Give high_noise (noise "
            f"levels from {boundary:g} up) or low_noise (those below), and train the other in a second run."
        )
    return STAGES[stage], (boundary, 1.0) if stage == "high_noise" else (0.0, boundary)


def _fits(base: str, config: Mapping[str, Any], vae: Mapping[str, Any], index: Mapping[str, Any]) -> bool:
    """Whether the pipeline starts from a first frame.

    Raises:
        ConfigError: a model that is none of Wan's text or image to video.
    """
    name = config.get("_class_name")
    if name != "WanTransformer3DModel":
        raise ConfigError(f"model.base: {base} has a {name}; the recipe takes WanTransformer3DModel.")
    z, given = int(vae.get("z_dim", 16)), int(config["in_channels"])
    if given not in (z, 2 * z + 4) or config.get("pos_embed_seq_len") is not None:
        raise ConfigError(
            f"model.base: the patch embedding of {base} takes {given} channels; with its autoencoder of {z} a text-to-"
            f"video model takes {z} and an image-to-video model {2 * z + 4}. Models with other inputs (VACE, control, "
            "first and last frame) do not fit."
        )
    starts = index["_class_name"] == "WanImageToVideoPipeline"
    if starts != (given != z) and not index.get("expand_timesteps"):
        raise ConfigError(
            f"model.base: {base} is a {index['_class_name']}, but its transformer takes {given} channels, as one "
            f"{'of text' if starts else 'of image'} to video does: correct _class_name in its model_index.json."
        )
    return starts
