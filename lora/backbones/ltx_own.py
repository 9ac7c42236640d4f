"""LTX-Video as it is, 0.9 and 0.9.5 and later: text and image to video, for which it has one transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from torch import nn

from ...attention.layout import VideoLayout
from ..config import ConfigError
from ..flow import TIMESTEPS
from .base import SampleRequest, Text
from .folders import read_config
from .pipeline_family import padded, without_padding
from .video_own import OwnVideoModel


class LTXModel(OwnVideoModel):
    """LTX-Video. With first frames, these are shown clean, at a timestep of 0."""

    text_pipeline, image_pipeline, does_both = LTXPipeline, LTXImageToVideoPipeline, True
    transformer_class, vae_class = LTXVideoTransformer3DModel, AutoencoderKLLTXVideo
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    text_length = 128
    frame_step = 8
    usual_fps = 25.0
    """Frames a second that the pipeline takes a video to have where nothing is said."""
    usual_shift = (256, 4096, 0.5, 1.15)
    """Of schedulers that do not say it: numbers of tokens, and the shifts at these."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def check_base(self) -> None:
        channels, given = self.vae.get("latent_channels", 128), self.config["in_channels"]
        patches = self.config["patch_size"], self.config["patch_size_t"]
        if given != channels or patches != (1, 1):
            raise ConfigError(
                f"model.base: the transformer of {self.base} takes {given} channels in patches of {patches[0]} and "
                f"{patches[1]} frames; LTX-Video takes the {channels} of its autoencoder in patches of 1."
            )
        self.clean_first = self.image
        self.frame_rate = self.usual_fps if self.fps is None else self.fps
        self.scheduler = read_config(FlowMatchEulerDiscreteScheduler, self.base, "scheduler")

    @property
    def token(self) -> int:
        return 32

    def grid(self, frames: int, height: int, width: int) -> VideoLayout:
        return VideoLayout((frames - 1) // 8 + 1, height // 32, width // 32)

    def check_layers(self, layers: Sequence[str]) -> str | None:
        other = [layer for layer in layers if layer.startswith(("proj_in", "time_embed"))]
        if not other:
            return None
        return f"{other[0]} has no name that both diffusers and ComfyUI know in a file: leave it out."

    def file_name(self, layer: str) -> str:
        return f"diffusion_model.{layer}"

    # -- clips and prompts ---------------------------------------------------------------------------------------------

    def latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        latents = vae.encode(pixels).latent_dist.mode().float()
        mean, std = (value.view(1, -1, 1, 1, 1).to(latents) for value in (vae.latents_mean, vae.latents_std))
        return (latents - mean) * vae.config.scaling_factor / std

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        states, mask, _, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        return [{"states": states} for states in without_padding(states, mask, self.base)]

    def count_tokens(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in pipe.tokenizer(list(prompts), verbose=False).input_ids]

    # -- flow matching -------------------------------------------------------------------------------------------------

    def shift(self, latents: torch.Tensor) -> float:
        """As the scheduler shifts a video of as many tokens; its stretching to a last noise level is not training's."""
        config = self.scheduler
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        few, many, low, high = (config.get(name, usual) for name, usual in zip(names, self.usual_shift, strict=True))
        mu = low + (high - low) * (latents.shape[2:].numel() - few) / (many - few)
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def velocity(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        texts: Sequence[Text],
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        states, mask = padded([text["states"] for text in texts])
        size = latents.shape[2:]
        made = model(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=states.to(latents.device, self.dtype),
            timestep=self.timestep(sigma, latents),
            encoder_attention_mask=mask.to(latents.device),
            **self.places(latents),
            return_dict=False,
        )[0]
        return made.transpose(1, 2).unflatten(2, size)

    def places(self, latents: torch.Tensor) -> dict[str, Any]:
        """Where the tokens of latents `[B, C, T, H, W]` are, as arguments of the transformer."""
        frames, height, width = latents.shape[2:]
        scale = (self.frame_step / self.frame_rate, self.token, self.token)
        return {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": scale}

    def timestep(self, sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What the model is told of the noise levels `[B]` of latents `[B, C, T, H, W]`."""
        told = sigma * TIMESTEPS
        if not self.clean_first:
            return told
        each = told[:, None, None].repeat(1, latents.shape[2], latents.shape[3] * latents.shape[4])
        each[:, 0] = 0
        return each.flatten(1)

    def prompt_inputs(self, text: Text, negative: Text, request: SampleRequest) -> dict[str, Any]:
        states, mask = padded([text["states"], negative["states"]])
        made: dict[str, Any] = {"guidance_scale": request.guidance_scale, "frame_rate": self.frame_rate}
        for name, each, valid in zip(("", "negative_"), states, mask, strict=True):
            made[f"{name}prompt_embeds"], made[f"{name}prompt_attention_mask"] = self.in_pipeline(each, valid)
        return made


PICTURE_NOISE = 0.15
"""The pipeline's `image_cond_noise_scale`: the picture is shown with this share of noise, times the squared level."""


class LTXConditionModel(LTXModel):
    """LTX-Video 0.9.5 and later, whose pipeline is one for text and image to video: without first frames, unless they
    are asked for. Its places are seconds from the first frame, and a first frame is shown with a little noise.
    """

    text_pipeline, image_pipeline = LTXConditionPipeline, None

    def places(self, latents: torch.Tensor) -> dict[str, Any]:
        ids = LTXConditionPipeline._prepare_video_ids(len(latents), *latents.shape[2:], device=latents.device)
        coordinates = LTXConditionPipeline._scale_video_ids(ids, self.token, self.frame_step).float()
        coordinates[:, 0] /= self.frame_rate
        return {"video_coords": coordinates}

    def timestep(self, sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        told = super().timestep(sigma, latents)
        return told if told.ndim == 2 else told[:, None]

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        shown = super().noised(latents, noise, sigma)
        if self.clean_first:
            shown[:, :, 0] += PICTURE_NOISE * sigma.view(-1, 1, 1, 1).square() * noise[:, :, 0]
        return shown
