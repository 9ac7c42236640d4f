"""What Wan models have in common, with whichever autoencoder: prompts, and how the transformer is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import nn
from torch.nn import functional

from ..flow import TIMESTEPS
from .base import PretrainedModel, SampleRequest, Text
from .wan_encoding import WanTextEncoder


class WanFamily(PretrainedModel):
    """A Wan transformer in diffusers' layout.

    Attributes:
        dtype: of the frozen weights.
        device: where encoders run.
        merge_text_padding: let one position stand for the padding of a prompt.
    """

    text_length = 512
    dtype: torch.dtype
    device: torch.device
    merge_text_padding: bool

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
        embeds = conditions.get("image_embeds")
        return model(
            hidden_states=latents,
            timestep=self.timestep(sigma, latents),
            encoder_hidden_states=self.pad(texts).to(latents.device, self.dtype),
            encoder_hidden_states_image=None if embeds is None else embeds.to(self.dtype),
            return_dict=False,
        )[0]

    def timestep(self, sigma: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What the model is told of the noise levels `[B]` of latents `[B, C, T, H, W]`."""
        return sigma * TIMESTEPS

    def pad(self, texts: Sequence[Text]) -> torch.Tensor:
        """States `[B, 512, D]`, zero behind each prompt; with `merge_text_padding` as many as are needed and one."""
        states = [text["states"] for text in texts]
        length = self.text_length
        if self.merge_text_padding:
            length = min(length, max(state.shape[0] for state in states) + 1)
        cut = [state[:length] for state in states]
        return torch.stack([functional.pad(state, (0, 0, 0, length - state.shape[0])) for state in cut])

    def text_encoder(self) -> WanTextEncoder:
        return WanTextEncoder(self.base, self.dtype, self.device, self.text_length, self.fingerprints)

    def picture(self, image: torch.Tensor) -> Any:
        """A first frame `[3, H, W]` in [-1, 1], as the pipeline of `sampler` takes it."""
        return (image[None] + 1) / 2

    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        pipe = self.sampler_of(transformer)
        if request.scheduler is not None:
            pipe.scheduler = request.scheduler
        pipe.set_progress_bar_config(disable=True)
        inputs = {"image": self.picture(request.image)} if self.image else {}
        embeds = [self.pad([text]).to(self.device, self.dtype) for text in texts]
        video = pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1] if request.guidance_scale > 1 else None,
            height=request.height,
            width=request.width,
            num_frames=request.frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pt",
            callback_on_step_end=request.callback,
            **inputs,
        ).frames[0]
        return video.transpose(0, 1).float().cpu() * 2 - 1


def base_pipeline(
    base: str, image: bool, keep: Sequence[str], dtype: torch.dtype = torch.float32
) -> WanPipeline | WanImageToVideoPipeline:
    """The base pipeline with only some of its components: transformers in the dtype, and all else in float32, in which
    clips and first frames are encoded; rounded on the way there, videos would be of another autoencoder.
    """
    cls = WanImageToVideoPipeline if image else WanPipeline
    every = ["tokenizer", "text_encoder", "scheduler", "transformer", "transformer_2", "vae"]
    every += ["image_encoder", "image_processor"] if image else []
    dtypes = {"default": torch.float32, "transformer": dtype, "transformer_2": dtype}
    return cls.from_pretrained(base, dtype=dtypes, **{name: None for name in every if name not in keep})
