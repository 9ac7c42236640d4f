"""FLUX, as it is, and moved to `AutoencoderDC`: there a token is one latent pixel, without the packing of 2x2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.nn import functional

from ...pipelines.deep_compression.adapted_images import flux_embedding, retarget_flux
from ...pipelines.deep_compression.text_to_image import DCGenFluxPipeline
from ..config import ConfigError
from .base import Text
from .folders import read_config
from .image import ImageBackbone
from .image_family import ImageFamily
from .image_own import OwnImageModel


class FluxFamily(ImageFamily):
    """Text to image with FLUX.1."""

    pipeline_class, transformer_class, vae_class = FluxPipeline, FluxTransformer2DModel, AutoencoderKL
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    text_length = 512
    usual_guidance = 3.5

    @property
    def takes_negative_prompts(self) -> bool:
        return False

    def check_base(self) -> None:
        channels = int(AutoencoderKL.load_config(self.base, subfolder="vae").get("latent_channels", 16))
        found = self.config.get("_class_name"), self.config.get("in_channels")
        if found != ("FluxTransformer2DModel", 4 * channels):
            raise ConfigError(
                f"model.base: {self.base} has a {found[0]} that takes {found[1]} channels a token; the recipes take a "
                f"FluxTransformer2DModel with {4 * channels}, 2x2 latents of its autoencoder (no fill, depth, control)."
            )

    def old_latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        latents = vae.encode(pixels).latent_dist.mode()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        # FLUX is trained with the padding of T5 in place, so it stays.
        states, pooled, _ = pipe.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=self.text_length
        )
        pairs = zip(states.float().cpu(), pooled.float().cpu(), strict=True)
        return [{"states": state.clone(), "pooled": pool.clone()} for state, pool in pairs]

    def count_tokens(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
        # Of T5. CLIP gives no more than one state for all of the prompt, from its beginning.
        return [len(ids) for ids in pipe.tokenizer_2(list(prompts), verbose=False).input_ids]

    def told(self, sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # diffusers casts the time to the type of the tokens before anything is computed of it.
        return sigma.to(dtype).float()

    def velocity(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        texts: Sequence[Text],
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        grid = self.packed(latents[:, :, 0])
        height, width = grid.shape[2:]
        states = torch.stack([text["states"] for text in texts]).to(latents.device, self.dtype)
        pooled = torch.stack([text["pooled"] for text in texts]).to(latents.device, self.dtype)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(latents)
        guidance = None
        if self.guidance is not None:
            guidance = torch.full((latents.shape[0],), self.guidance, device=latents.device)
        made = model(
            hidden_states=grid.flatten(2).transpose(1, 2),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigma,  # the model itself multiplies by 1000
            img_ids=places,
            txt_ids=latents.new_zeros(states.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return self.unpacked(made.transpose(1, 2).unflatten(2, (height, width)))[:, :, None]

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Tokens as a grid `[B, C, h, w]`, of latents `[B, C, H, W]`."""
        return latents

    def unpacked(self, grid: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return grid

    def prompt_inputs(self, text: Text, negative: Text) -> dict[str, Any]:
        pair = {"prompt_embeds": text["states"], "pooled_prompt_embeds": text["pooled"]}
        return {name: value[None].to(self.device, self.dtype) for name, value in pair.items()}


class FluxBackbone(FluxFamily, ImageBackbone):
    """FLUX.1, moved to another autoencoder."""

    trained_fully = ("x_embedder.", "proj_out.")
    # The picture's side of attention and feed-forward, and the time embedding; not the text's.
    lora_targets = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
        r"|time_text_embed\.timestep_embedder\.linear_[12]"
    )
    embedding_name = "x_embedder"

    def new_embedding(self) -> nn.Linear:
        return flux_embedding(self.latent_channels, self.inner)

    def swap(self, transformer: FluxTransformer2DModel) -> None:
        retarget_flux(transformer, self.latent_channels, self.latent_channels)

    def embed(self, embedding: nn.Module, latents: torch.Tensor, old: bool) -> torch.Tensor:
        # FLUX packs 2x2 latent pixels in the order (channel, row, column).
        grid = functional.pixel_unshuffle(latents, 2) if old else latents
        return embedding(grid.movedim(1, -1)).movedim(-1, 1)

    def assemble(self, base: DiffusionPipeline, vae: nn.Module, transformer: nn.Module) -> DCGenFluxPipeline:
        components = {name: getattr(base, name, None) for name in (*self.text_parts, "scheduler")}
        return DCGenFluxPipeline(**components, vae=vae, transformer=transformer)


class FluxModel(FluxFamily, OwnImageModel):
    """FLUX.1 as it is."""

    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_mlp")

    def unit(self) -> int:
        return 2 ** len(read_config(AutoencoderKL, self.base, "vae")["block_out_channels"])

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        return functional.pixel_unshuffle(latents, 2)  # in the order (channel, row, column)

    def unpacked(self, grid: torch.Tensor) -> torch.Tensor:
        return functional.pixel_shuffle(grid, 2)
