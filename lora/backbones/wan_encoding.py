"""Clips and prompts as Wan models see them, in the old and the new latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from ...pipelines.deep_compression.image_to_video import image_condition
from ..data.cache import fingerprint, tokenizer_fingerprint
from .base import Encoder, Text, TextEncoder
from .folders import to_cpu

PARTS = ("latents", "teacher", "condition", "teacher_condition", "image_embeds")


class WanEncoder(Encoder):
    """Encodes clips of 4k frames.

    - "latents": `[C, k, H/f, W/f]` of the new autoencoder, scaled.
    - "teacher": `[z, k, H/8, W/8]` of the old one, normalised, of the last 4k - 3 frames: but for the first, each
      latent frame then stands for the middle of the same four pixel frames as that of the new autoencoder.
    - "condition", "teacher_condition": mask and latents of the first frame, as the image-to-video pipelines give them.
    - "image_embeds": states of the image encoder for the first frame.

    Args:
        base: folder or hub id of the Wan pipeline.
        autoencoder: the new one.
        parts: which of these.
        device: where it runs.

    Raises:
        ValueError: a part that there is not.
        OSError: the base has no old autoencoder or no image encoder, where one of the parts needs it.
    """

    def __init__(self, base: str, autoencoder: Any, parts: tuple[str, ...], device: torch.device | str = "cpu") -> None:
        unknown = set(parts) - set(PARTS)
        if unknown:
            raise ValueError(f"there are no parts {sorted(unknown)}; known: {', '.join(PARTS)}.")
        self.base, self.autoencoder, self.parts, self.device = base, autoencoder, parts, torch.device(device)
        self._old: AutoencoderKLWan | None = None
        self._eye: WanImageToVideoPipeline | None = None
        self.identities = {name: f"{name} 1, {self._model_of(name)}" for name in parts}

    def _model_of(self, part: str) -> str:
        if part in ("latents", "condition"):
            return fingerprint(self.autoencoder)
        # Where they were loaded: it may be long before they run.
        return fingerprint(self._loaded_old() if part.startswith("teacher") else self._loaded_eye().image_encoder)

    @property
    def old(self) -> AutoencoderKLWan:
        """The autoencoder of the base, in float32, where it runs."""
        return self._loaded_old().to(self.device)

    @property
    def eye(self) -> WanImageToVideoPipeline:
        """A pipeline with nothing but the image encoder, where it runs."""
        return self._loaded_eye().to(self.device)

    def _loaded_old(self) -> AutoencoderKLWan:
        if self._old is None:
            self._old = AutoencoderKLWan.from_pretrained(self.base, subfolder="vae").requires_grad_(False).eval()
            self._old.enable_slicing()
        return self._old

    def _loaded_eye(self) -> WanImageToVideoPipeline:
        if self._eye is None:
            absent = ("tokenizer", "text_encoder", "scheduler", "transformer", "transformer_2", "vae")
            self._eye = WanImageToVideoPipeline.from_pretrained(self.base, **dict.fromkeys(absent))
        return self._eye

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, parts: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        parts = self.parts if parts is None else parts
        pixels = pixels.to(self.device)
        made = {}
        if "latents" in parts:
            new = self.autoencoder.to(self.device)
            made["latents"] = new.encode(pixels.to(new.dtype)).latent.float() * new.config.scaling_factor
        if "condition" in parts:
            count = pixels.shape[2] // 4
            made["condition"] = image_condition(self.autoencoder.to(self.device), pixels[:, :, 0], count).float()
        shown = pixels[:, :, 3:]
        if "teacher" in parts:
            made["teacher"] = self._normalised(shown)
        if "teacher_condition" in parts:
            video = torch.zeros_like(shown)
            video[:, :, 0] = shown[:, :, 0]
            latents = self._normalised(video)
            mask = latents.new_zeros(latents.shape[0], 4, *latents.shape[2:])
            mask[:, :, 0] = 1
            made["teacher_condition"] = torch.cat([mask, latents], dim=1)
        if "image_embeds" in parts:
            pictures = [
                (picture.permute(1, 2, 0).cpu() + 1).mul(127.5).round().byte().numpy() for picture in pixels[:, :, 0]
            ]
            made["image_embeds"] = self.eye.encode_image(pictures, self.device).float()
        return made

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = self.old.encode(pixels).latent_dist.mode()
        mean, std = (
            latents.new_tensor(self.old.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std")
        )
        return (latents - mean) / std

    def release(self) -> None:
        self._old = self._eye = None
        self.autoencoder.to("cpu")


class WanTextEncoder(TextEncoder):
    """Encodes prompts as `WanPipeline` does.

    Args:
        base: folder or hub id of the Wan pipeline.
        dtype, device: of the encoder.
        length: tokens at which prompts are cut.
    """

    def __init__(
        self, base: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", length: int = 512
    ) -> None:
        self.base, self.dtype, self.device, self.length = base, dtype, torch.device(device), length
        self._pipe: WanPipeline | None = None
        pipe = self._loaded()
        models = f"{fingerprint(pipe.text_encoder)} {tokenizer_fingerprint(pipe.tokenizer)}"
        self.identity = f"{models} {dtype} {length}"

    @property
    def pipe(self) -> WanPipeline:
        """A pipeline with nothing but tokenizer and text encoder, where it runs."""
        return self._loaded().to(self.device)

    def _loaded(self) -> WanPipeline:
        if self._pipe is None:
            absent = dict.fromkeys(("scheduler", "transformer", "transformer_2", "vae"))
            self._pipe = WanPipeline.from_pretrained(self.base, dtype=self.dtype, **absent)
            self._pipe.text_encoder.requires_grad_(False)
        return self._pipe

    def count(self, prompts: Sequence[str]) -> list[int]:
        cleaned = [prompt_clean(prompt) for prompt in prompts]
        return [len(ids) for ids in self._loaded().tokenizer(cleaned, verbose=False).input_ids]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Text]:
        states, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.length, device=self.device
        )
        # The pipeline fills up with exact zeros, which a prompt's own states are not.
        lengths = [max(1, int(state.any(dim=1).sum())) for state in states]
        return [{"states": s[:n].float().cpu().clone()} for s, n in zip(states, lengths, strict=True)]

    def park(self) -> None:
        if self._pipe is not None:
            to_cpu(self._pipe)

    def release(self) -> None:
        self._pipe = None
