"""LTX-2 as it is, its video alone: text and image to video, for which it has one transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    DiffusionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from torch import nn

from ..flow import TIMESTEPS
from .base import SampleRequest, Text
from .ltx_own import LTXModel

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LTX2Model(LTXModel):
    """LTX-2, which makes a video and its sound. Clips have no sound here, so the two are trained apart, as the model
    knows it (`isolate_modalities`): the layers of the video learn, and those of the sound are not asked.

    A text is what the connectors make of a prompt for the video ("states") and for the sound ("audio").
    """

    text_pipeline, image_pipeline = LTX2Pipeline, LTX2ImageToVideoPipeline
    transformer_class, vae_class = LTX2VideoTransformer3DModel, AutoencoderKLLTX2Video
    text_parts = ("text_encoder", "tokenizer", "connectors")
    text_length = 1024
    usual_fps, usual_shift = 24.0, (1024, 4096, 0.95, 2.05)
    lora_targets = (
        *(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in _ATTENTION),
        "ff.net.0.proj",
        "ff.net.2",
    )

    def check_layers(self, layers: Sequence[str]) -> str | None:
        other = [layer for layer in layers if not layer.startswith("transformer_blocks.") or "audio" in layer]
        if not other:
            return None
        why = "is of the sound, which is not trained" if "audio" in other[0] else "is in no block"
        return f"{other[0]} {why}: name layers with attn1., attn2. or ff. before their ends."

    # -- clips and prompts ---------------------------------------------------------------------------------------------

    @property
    def encoded_as(self) -> str:
        return f"{super().encoded_as}{' picture' if self.clean_first else ''}"

    def latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        made = super().latents(vae, pixels)
        if self.clean_first:  # the pipeline encodes the picture alone, and not all autoencoders look back only
            made[:, :, :1] = super().latents(vae, pixels[:, :, :1])
        return made

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[Text]:
        states, mask, _, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        video, audio, mask = pipe.connectors(states, mask, padding_side=pipe.tokenizer.padding_side)
        parts = zip(video.float().cpu(), audio.float().cpu(), mask.reshape(len(prompts), -1).cpu(), strict=True)
        return [{"states": v.clone(), "audio": a.clone(), "mask": m.clone()} for v, a, m in parts]

    # -- flow matching -------------------------------------------------------------------------------------------------

    def velocity(
        self,
        model: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        texts: Sequence[Text],
        conditions: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        states, audio, mask = (torch.stack([text[part] for text in texts]) for part in ("states", "audio", "mask"))
        told = sigma * TIMESTEPS
        made = model(
            hidden_states=latents.flatten(2).transpose(1, 2),
            encoder_hidden_states=states.to(latents.device, self.dtype),
            encoder_attention_mask=mask.to(latents.device),
            timestep=self.timestep(sigma, latents),
            sigma=told,
            # One moment of silence, which the video does not hear.
            audio_hidden_states=latents.new_zeros(len(latents), 1, self.config["audio_in_channels"]),
            audio_encoder_hidden_states=audio[:, :1].to(latents.device, self.dtype),
            audio_timestep=told,
            audio_num_frames=1,
            isolate_modalities=True,
            **self.places(latents),
            return_dict=False,
        )[0]
        return made.transpose(1, 2).unflatten(2, latents.shape[2:])

    def places(self, latents: torch.Tensor) -> dict[str, Any]:
        frames, height, width = latents.shape[2:]
        return {"num_frames": frames, "height": height, "width": width, "fps": self.frame_rate}

    # -- results -------------------------------------------------------------------------------------------------------

    def sampler(self, transformer: nn.Module) -> DiffusionPipeline:
        pipe = self.decoding("scheduler", "vae", "audio_vae", "vocoder")
        pipe.to(self.device)  # before the transformer is in it, which may be spread over devices
        pipe.register_modules(transformer=transformer, connectors=_Connected(self._width, self.device))
        return pipe

    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        self._width = texts[0]["states"].shape[1]
        return super().sample(transformer, texts, request)

    def prompt_inputs(self, text: Text, negative: Text, request: SampleRequest) -> dict[str, Any]:
        """What the connectors made stands for what they would be given, see `_Connected`."""
        made: dict[str, Any] = {"guidance_scale": request.guidance_scale, "frame_rate": self.frame_rate}
        for name, each in (("", text), ("negative_", negative)):
            known = torch.cat([each["states"], each["audio"]], dim=1)
            made[f"{name}prompt_embeds"], made[f"{name}prompt_attention_mask"] = self.in_pipeline(known, each["mask"])
        return made


class _Connected(nn.Module):
    """In the place of the connectors, where prompts are given as these make them: for video and sound side by side.

    Args:
        width: of what is for the video.
        device: what the pipeline is told where its parts are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.width, self.device = width, device

    def forward(
        self, states: torch.Tensor, mask: torch.Tensor, padding_side: str = "left"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return states[..., : self.width], states[..., self.width :], mask
