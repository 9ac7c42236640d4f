"""SANA, as it is, and moved from its own `AutoencoderDC` to a deeper one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC, DiffusionPipeline, SanaPipeline, SanaTransformer2DModel
from torch import nn

from ...pipelines.deep_compression.adapted_images import retarget_sana, sana_embedding
from ...pipelines.deep_compression.text_to_image import DCGenSanaPipeline
from ..config import ConfigError
from ..flow import TIMESTEPS
from .base import Text
from .folders import read_config
from .image import ImageBackbone
from .image_family import ImageFamily
from .image_own import OwnImageModel
from .pipeline_family import padded

_INSTRUCTION: list[str] = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What the pipeline puts before prompts."""


class SanaFamily(ImageFamily):
    """Text to image with SANA 1.0 and 1.5."""

    pipeline_class, transformer_class, vae_class = SanaPipeline, SanaTransformer2DModel, AutoencoderDC
    text_parts = ("text_encoder", "tokenizer")
    text_length = 300

    def check_base(self) -> None:
        channels = int(AutoencoderDC.load_config(self.base, subfolder="vae").get("latent_channels", 32))
        found = self.config.get("_class_name"), self.config.get("in_channels"), self.config.get("patch_size", 1)
        if found != ("SanaTransformer2DModel", channels, 1):
            raise ConfigError(
                f"model.base: {self.base} has a {found[0]} that takes {found[1]} channels in patches of {found[2]}; "
                f"the recipes take a SanaTransformer2DModel with the {channels} of its autoencoder in patches of 1."
            )
        if self.config.get("guidance_embeds"):
            raise ConfigError(f"model.base: {self.base} is a distilled SANA (Sprint), which no recipe does.")

    def old_latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        return vae.encode(pixels).latent * vae.config.scaling_factor

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        made = []
        for prompt in prompts:
            states, mask, _, _ = pipe.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.text_length,
                # The pipeline puts none before the empty one.
                complex_human_instruction=_INSTRUCTION if prompt else None,
            )
            made.append({"states": states[0].float().cpu()[mask[0].bool().cpu()].clone()})
        return made

    @property
    def prompt_frame(self) -> str:
        return "\n".join(_INSTRUCTION)

    def count_tokens(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
        # The pipeline cuts what is longer than the instruction and `text_length`, of which two are the first and last.
        frame = len(pipe.tokenizer.encode(self.prompt_frame))
        framed = [self.prompt_frame + prompt.lower().strip() for prompt in prompts]
        return [len(ids) - frame + 2 for ids in pipe.tokenizer(framed, verbose=False).input_ids]

    def velocity(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        texts: Sequence[Text],
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        states, mask = padded([text["states"] for text in texts])
        made = model(
            hidden_states=latents[:, :, 0],
            encoder_hidden_states=states.to(latents.device, self.dtype),
            encoder_attention_mask=mask.to(latents.device),
            timestep=sigma * TIMESTEPS * self.config.get("timestep_scale", 1.0),
            return_dict=False,
        )[0]
        return made[:, :, None]

    def prompt_inputs(self, text: Text, negative: Text) -> dict[str, Any]:
        made: dict[str, Any] = {"negative_prompt": None}
        both, masks = padded([text["states"], negative["states"]])
        for name, states, mask in zip(("", "negative_"), both, masks, strict=True):
            made[f"{name}prompt_embeds"] = states[None].to(self.device, self.dtype)
            made[f"{name}prompt_attention_mask"] = mask[None].to(self.device)
        return made


class SanaBackbone(SanaFamily, ImageBackbone):
    """SANA, moved to another autoencoder."""

    trained_fully = ("patch_embed.proj.", "proj_out.")
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|to_out\.0)|ff\.conv_(inverted|point))"
        r"|time_embed\.(emb\.timestep_embedder\.linear_[12]|linear)"
    )
    embedding_name = "patch_embed.proj"

    def new_embedding(self) -> nn.Conv2d:
        return sana_embedding(self.latent_channels, self.inner)

    def swap(self, transformer: SanaTransformer2DModel) -> None:
        retarget_sana(transformer, self.latent_channels, self.latent_channels)

    def embed(self, embedding: nn.Module, latents: torch.Tensor, old: bool) -> torch.Tensor:
        return embedding(latents)

    def assemble(self, base: DiffusionPipeline, vae: nn.Module, transformer: nn.Module) -> DCGenSanaPipeline:
        components = {name: getattr(base, name, None) for name in (*self.text_parts, "scheduler")}
        return DCGenSanaPipeline(**components, vae=vae, transformer=transformer)


class SanaModel(SanaFamily, OwnImageModel):
    """SANA as it is."""

    lora_targets = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "attn2.to_q",
        "attn2.to_k",
        "attn2.to_v",
        "attn2.to_out.0",
        "ff.conv_inverted",
        "ff.conv_point",
    )

    def unit(self) -> int:
        return 2 ** (len(read_config(AutoencoderDC, self.base, "vae")["encoder_block_out_channels"]) - 1)

    def prompt_inputs(self, text: Text, negative: Text) -> dict[str, Any]:
        # The size is the one that was asked for, not the nearest of the pipeline's list.
        return super().prompt_inputs(text, negative) | {"use_resolution_binning": False}
