"""Clips and prompts as Wan models see them, in the old and the new latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from ...pipelines.deep_compression.image_to_video import image_condition
from ..data.cache import Fingerprints, fingerprint, tokenizer_fingerprint
from .base import Encoder, Text, TextEncoder, encoded_how
from .folders import to_cpu


class WanParts(Encoder):
    """What clips are encoded with that belongs to a Wan pipeline: its autoencoder and its image encoder, in float32.

    Args:
        base: folder or hub id of the Wan pipeline.
        device: where they run.
        dtype: of the autoencoder.
        fingerprints: what names them.
        tiled: the autoencoder encodes large clips in tiles.
    """

    def __init__(
        self,
        base: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        fingerprints: Fingerprints | None = None,
        tiled: bool = False,
    ) -> None:
        self.base, self.device, self.dtype, self.tiled = base, torch.device(device), dtype, tiled
        self.fingerprints = fingerprints or Fingerprints()
        self._own: AutoencoderKLWan | None = None
        self._eye: WanImageToVideoPipeline | None = None

    @property
    def own(self) -> AutoencoderKLWan:
        """The autoencoder of the base, where it runs."""
        return self.loaded_own().to(self.device)

    @property
    def eye(self) -> WanImageToVideoPipeline:
        """A pipeline with nothing but the image encoder, where it runs."""
        return self.loaded_eye().to(self.device)

    def loaded_own(self) -> AutoencoderKLWan:
        if self._own is None:
            self._own = AutoencoderKLWan.from_pretrained(self.base, subfolder="vae", dtype=self.dtype)
            self._own.requires_grad_(False).eval()
            self._own.enable_slicing()
            if self.tiled:
                self._own.enable_tiling()
        return self._own

    def loaded_eye(self) -> WanImageToVideoPipeline:
        if self._eye is None:
            absent = ("tokenizer", "text_encoder", "scheduler", "transformer", "transformer_2", "vae")
            self._eye = WanImageToVideoPipeline.from_pretrained(self.base, **dict.fromkeys(absent))
        return self._eye

    def release(self) -> None:
        self._own = self._eye = None

    def name_of_own(self) -> str:
        """What the autoencoder is, where that is known without loading it."""
        return self.fingerprints.of(self.base, "vae", self.dtype, self.loaded_own)

    def name_of_eye(self) -> str:
        """The same of the image encoder."""
        return self.fingerprints.of(self.base, "image_encoder", torch.float32, lambda: self.loaded_eye().image_encoder)

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents `[B, z, T, h, w]` of clips `[B, 3, F, H, W]` in [-1, 1], as the model sees them."""
        own = self.own
        latents = own.encode(pixels.to(own.dtype)).latent_dist.mode().float()
        mean, std = (latents.new_tensor(own.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
        return (latents - mean) / std

    def first_frame_condition(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mask `[B, 4, T, h, w]` and latents of the first frame alone, as the image-to-video pipeline gives them."""
        video = torch.zeros_like(pixels)
        video[:, :, 0] = pixels[:, :, 0]
        latents = self.normalised(video)
        mask = latents.new_zeros(latents.shape[0], 4, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)

    def image_embeds(self, pixels: torch.Tensor) -> torch.Tensor:
        """States of the image encoder for the first frames of clips."""
        pictures = [
            (picture.permute(1, 2, 0).cpu() + 1).mul(127.5).round().byte().numpy() for picture in pixels[:, :, 0]
        ]
        return self.eye.encode_image(pictures, self.device).float()


class OwnWanEncoder(WanParts):
    """Encodes clips of 4k + 1 frames as the base's own pipeline does: "latents", "condition" and "image_embeds".

    Args:
        base, device, dtype, fingerprints, tiled: as those of `WanParts`.
        parts: which of these.
    """

    def __init__(
        self,
        base: str,
        parts: tuple[str, ...],
        device: torch.device | str,
        dtype: torch.dtype,
        fingerprints: Fingerprints | None = None,
        tiled: bool = False,
    ) -> None:
        super().__init__(base, device, dtype, fingerprints, tiled)
        self.parts = parts
        own = f"{self.name_of_own()} {dtype}{' tiled' if tiled else ''}"
        models = {name: own for name in parts}
        if "image_embeds" in parts:
            models["image_embeds"] = self.name_of_eye()
        self.identities = {name: f"wan {name} 1, {model}" for name, model in models.items()}

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, parts: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        makes = {
            "latents": self.normalised,
            "condition": self.first_frame_condition,
            "image_embeds": self.image_embeds,
        }
        pixels = pixels.to(self.device)
        return {name: makes[name](pixels) for name in (self.parts if parts is None else parts)}


PARTS = ("latents", "teacher", "condition", "teacher_condition", "image_embeds")


class WanEncoder(WanParts):
    """Encodes clips of 4k frames.

    - "latents": `[C, k, H/f, W/f]` of the new autoencoder, scaled.
    - "teacher": `[z, k, H/8, W/8]` of the old one, normalised, of the last 4k - 3 frames: but for the first, each
      latent frame then stands for the middle of the same four pixel frames as that of the new autoencoder.
    - "condition", "teacher_condition": mask and latents of the first frame, as the image-to-video pipelines give them.
    - "image_embeds": states of the image encoder for the first frame.

    Args:
        base: folder or hub id of the Wan pipeline.
        autoencoder: the new one, in its dtype and in tiles or not.
        parts: which of these.
        device: where it runs.
        fingerprints, tiled: as those of `WanParts`.

    Raises:
        ValueError: a part that there is not.
        OSError: the base has no old autoencoder or no image encoder, where one of the parts needs it.
    """

    def __init__(
        self,
        base: str,
        autoencoder: Any,
        parts: tuple[str, ...],
        device: torch.device | str = "cpu",
        fingerprints: Fingerprints | None = None,
        tiled: bool = False,
    ) -> None:
        unknown = set(parts) - set(PARTS)
        if unknown:
            raise ValueError(f"there are no parts {sorted(unknown)}; known: {', '.join(PARTS)}.")
        super().__init__(base, device, fingerprints=fingerprints, tiled=tiled)
        self.autoencoder, self.parts = autoencoder, parts
        self.identities = {name: f"{name} 1, {self._model_of(name)}" for name in parts}

    def _model_of(self, part: str) -> str:
        if part in ("latents", "condition"):
            return fingerprint(self.autoencoder) + encoded_how(self.autoencoder.dtype, self.autoencoder.use_tiling)
        if part.startswith("teacher"):
            return self.name_of_own() + encoded_how(self.dtype, self.tiled)
        return self.name_of_eye()

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
            made["teacher"] = self.normalised(shown)
        if "teacher_condition" in parts:
            made["teacher_condition"] = self.first_frame_condition(shown)
        if "image_embeds" in parts:
            made["image_embeds"] = self.image_embeds(pixels)
        return made

    def release(self) -> None:
        super().release()
        self.autoencoder.to("cpu")


class WanTextEncoder(TextEncoder):
    """Encodes prompts as `WanPipeline` does.

    Args:
        base: folder or hub id of the Wan pipeline.
        dtype, device: of the encoder.
        length: tokens at which prompts are cut.
        fingerprints: what names the encoder, which is loaded when the first prompt is encoded, or for its name.
    """

    def __init__(
        self,
        base: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        length: int = 512,
        fingerprints: Fingerprints | None = None,
    ) -> None:
        self.base, self.dtype, self.device, self.length = base, dtype, torch.device(device), length
        self._pipe: WanPipeline | None = None
        self._tokenizer = self._with_parts("text_encoder").tokenizer
        known = fingerprints or Fingerprints()
        model = known.of(base, "text_encoder", dtype, lambda: self._loaded().text_encoder)
        models = f"{model} {tokenizer_fingerprint(self._tokenizer)}"
        self.identity = f"{models} {dtype} {length}"

    @property
    def pipe(self) -> WanPipeline:
        """A pipeline with nothing but tokenizer and text encoder, where it runs."""
        return self._loaded().to(self.device)

    def _loaded(self) -> WanPipeline:
        if self._pipe is None:
            self._pipe = self._with_parts()
            self._pipe.text_encoder.requires_grad_(False)
        return self._pipe

    def _with_parts(self, *without: str) -> WanPipeline:
        absent = dict.fromkeys(("scheduler", "transformer", "transformer_2", "vae", *without))
        return WanPipeline.from_pretrained(self.base, dtype=self.dtype, **absent)

    def count(self, prompts: Sequence[str]) -> list[int]:
        cleaned = [prompt_clean(prompt) for prompt in prompts]
        return [len(ids) for ids in self._tokenizer(cleaned, verbose=False).input_ids]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], pictures: Sequence[torch.Tensor] | None = None) -> list[Text]:
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
