"""CogVideoX 1.0 and 1.5 as they are: text and image to video.

No flow matching: noisy latents are a x + b e by the schedule of the model's own scheduler, a^2 + b^2 = 1, and the model
predicts v = a e - b x ("v-prediction", arXiv 2202.00512, section 4). The squared error of v is that of x, weighted with
1 / b^2, which the model was trained with. A noise level is a place in the schedule: the timestep / number of timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import nn

from ...attention.layout import VideoLayout
from ..config import ConfigError
from .base import SampleRequest, Text
from .folders import read_config
from .video_own import OwnVideoModel

_COMFYUI_PARTS = {
    "transformer_blocks.": "blocks.",
    ".attn1.to_q": ".q",
    ".attn1.to_k": ".k",
    ".attn1.to_v": ".v",
    ".attn1.to_out.0": ".attn_out",
    ".ff.net.0.proj": ".ff_proj",
    ".ff.net.2": ".ff_out",
}
"""diffusers' names of layers -> ComfyUI's."""


class CogVideoXModel(OwnVideoModel):
    """CogVideoX. The picture of image to video enters beside the first latent frame."""

    text_pipeline, image_pipeline = CogVideoXPipeline, CogVideoXImageToVideoPipeline
    transformer_class, vae_class = CogVideoXTransformer3DModel, AutoencoderKLCogVideoX
    text_parts = ("text_encoder", "tokenizer")
    frame_step = 8
    density = "uniform"
    conditioned = True
    lora_targets = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")

    def check_base(self) -> None:
        channels, given = self.vae.get("latent_channels", 16), self.config["in_channels"]
        if given != channels * (2 if self.image else 1):
            raise ConfigError(
                f"model.base: the transformer of {self.base} takes {given} channels; with an autoencoder of {channels} "
                f"a text-to-video model takes {channels}, and an image-to-video model {2 * channels}."
            )
        config = read_config(CogVideoXDDIMScheduler, self.base, "scheduler")
        if config.get("prediction_type") != "v_prediction":
            raise ConfigError(
                f"model.base: the scheduler of {self.base} has the prediction_type {config.get('prediction_type')}; "
                "CogVideoX predicts v: correct it to v_prediction in scheduler/scheduler_config.json."
            )
        self.schedule = CogVideoXDDIMScheduler.from_config(config)
        self.text_length = self.config.get("max_text_seq_length", 226)
        self.patch_frames = self.config.get("patch_size_t") or 1

    @property
    def token(self) -> int:
        return 2 ** (len(self.vae["block_out_channels"]) - 1) * self.config["patch_size"]

    def check_size(self, frames: int, height: int, width: int) -> str | None:
        if refusal := super().check_size(frames, height, width):
            return refusal
        side = self.token // self.config["patch_size"]
        fixed = tuple(self.config[f"sample_{name}"] * side for name in ("height", "width"))
        most = self.config["sample_frames"]
        if self.config.get("use_learned_positional_embeddings") and ((height, width) != fixed or frames > most):
            return (
                f"{self.base} has learned the positions of {fixed[0]}x{fixed[1]} and up to {most} frames, and takes no "
                f"others; it is given {frames} frames of {height}x{width}."
            )
        return None

    def grid(self, frames: int, height: int, width: int) -> VideoLayout:
        latent = (frames - 1) // 4 + 1
        size = (-(-latent // self.patch_frames), height // self.token, width // self.token)
        return VideoLayout(*size, text_before=self.text_length)

    def comfyui_name(self, layer: str) -> str:
        for theirs, own in _COMFYUI_PARTS.items():
            layer = layer.replace(theirs, own)
        return f"diffusion_model.{layer}"

    # -- clips and prompts ---------------------------------------------------------------------------------------------

    def latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        return self._whole(vae.encode(pixels).latent_dist.mode().float() * vae.config.scaling_factor)

    def _whole(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents whose frames fill the patches of 1.5: the first one is repeated in front, as it was trained."""
        missing = -latents.shape[2] % self.patch_frames
        return torch.cat([latents[:, :, :missing], latents], dim=2)

    def condition(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        scale = vae.config.scaling_factor
        shown = vae.encode(pixels[:, :, :1]).latent_dist.mode().float()
        shown = shown / scale if vae.config.invert_scale_latents else shown * scale
        latent = (pixels.shape[2] - 1) // 4 + 1
        whole = shown.new_zeros(*shown.shape[:2], latent + -latent % self.patch_frames, *shown.shape[3:])
        whole[:, :, :1] = shown
        return whole

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        # The model reads the padding too, which no mask hides.
        states, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        return [{"states": state.clone()} for state in states.float().cpu()]

    def count_tokens(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in pipe.tokenizer(list(prompts), verbose=False).input_ids]

    # -- v-prediction --------------------------------------------------------------------------------------------------

    def shift(self, latents: torch.Tensor) -> float:
        return 1.0  # the schedule has its own

    def told(self, sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        count = self.schedule.config.num_train_timesteps
        return (sigma * count).floor().clamp(max=count - 1) / count

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """The timesteps of noise levels `[B]` that `told` gave."""
        return (sigma * self.schedule.config.num_train_timesteps).round().long()

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.schedule.add_noise(latents, noise, self.timestep(sigma))

    def target(self, latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.schedule.get_velocity(latents, noise, self.timestep(sigma))

    def velocity(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        texts: Sequence[Text],
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        if "condition" in conditions:
            latents = torch.cat([latents, conditions["condition"].to(latents)], dim=1)
        states = torch.stack([text["states"] for text in texts])
        made = model(
            hidden_states=latents.transpose(1, 2),  # frames come before channels
            encoder_hidden_states=states.to(latents.device, self.dtype),
            timestep=self.timestep(sigma),
            ofs=None if self.config.get("ofs_embed_dim") is None else latents.new_full((1,), 2.0),
            image_rotary_emb=self.rotary(latents),
            return_dict=False,
        )[0]
        return made.transpose(1, 2)

    def rotary(self, latents: torch.Tensor) -> Any:
        """Rotary embeddings of the places of latents `[B, C, T, H, W]`; None for models without (2B)."""
        config = self.config
        if not config.get("use_rotary_positional_embeddings"):
            return None
        patch, (frames, height, width) = config["patch_size"], latents.shape[2:]
        size = (height // patch, width // patch)
        usual_height, usual_width = config["sample_height"] // patch, config["sample_width"] // patch
        if config.get("patch_size_t") is None:
            crops = get_resize_crop_region_for_grid(size, usual_width, usual_height)
            more: dict[str, Any] = {"crops_coords": crops, "temporal_size": frames}
        else:
            more = {"crops_coords": None, "temporal_size": -(-frames // self.patch_frames)}
            more |= {"grid_type": "slice", "max_size": (usual_height, usual_width)}
        return get_3d_rotary_pos_embed(config["attention_head_dim"], grid_size=size, device=latents.device, **more)

    def prompt_inputs(self, text: Text, negative: Text, request: SampleRequest) -> dict[str, Any]:
        states, without = self.in_pipeline(text["states"], negative["states"])
        return {
            "prompt_embeds": states,
            "negative_prompt_embeds": without,
            "guidance_scale": request.guidance_scale,
        }
