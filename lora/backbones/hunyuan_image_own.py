"""HunyuanVideo as it is: image to video, whose text encoder sees the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, HunyuanVideoImageToVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image

from ..config import ConfigError
from .base import Text
from .hunyuan_own import HunyuanVideoModel
from .pipeline_family import without_padding
from .video_own import picture

CONCATENATED, REPLACED = "latent_concat", "token_replace"
"""How a transformer is given the picture: beside the latents, or as the first frame of them, which is then clean."""

_INTERLEAVE = {CONCATENATED: 2, REPLACED: 4}
"""The transformer gets one in so many of the tokens that the text encoder makes of a picture."""


class HunyuanVideoImageModel(HunyuanVideoModel):
    """HunyuanVideo I2V, of both kinds. The text of a clip has tokens of its first frame; what stands for no caption has
    those of a black picture, which the pipeline shows with negative prompts.
    """

    text_pipeline = image_pipeline = HunyuanVideoImageToVideoPipeline
    text_parts = (*HunyuanVideoModel.text_parts, "image_processor")
    pictured = True

    def check_channels(self, channels: int, given: int) -> None:
        kind, made = self.config.get("image_condition_type"), self.config.get("out_channels") or given
        wanted = {CONCATENATED: 2 * channels + 1, REPLACED: channels}
        if wanted.get(kind) != given or made != channels:
            raise ConfigError(
                f"model.base: the transformer of {self.base} takes {given} channels, makes {made}, and takes the "
                f"picture as {kind}; with an autoencoder of {channels} it makes {channels}, and takes "
                f"{2 * channels + 1} with {CONCATENATED}, or {channels} with {REPLACED}."
            )
        self.condition_type = str(kind)
        self.clean_first, self.conditioned = kind == REPLACED, kind == CONCATENATED
        # The pipeline takes the first latent frame, which stands for the picture, for no part of the video.
        self.frames_cut = 4 if kind == CONCATENATED else 0

    @property
    def encoded_as(self) -> str:
        return f"{super().encoded_as} {self.condition_type}"

    @property
    def picture_tokens(self) -> int:
        return DEFAULT_PROMPT_TEMPLATE["image_emb_len"] // _INTERLEAVE[self.condition_type]

    # -- clips and prompts ---------------------------------------------------------------------------------------------

    def latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        made = super().latents(vae, pixels)
        if self.clean_first:  # the norms of the autoencoder are over all frames, and the pipeline encodes one alone
            made[:, :, :1] = self.condition(vae, pixels)
        return made

    def condition(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of the first frames alone, `[B, C, 1, h, w]`."""
        return super().latents(vae, pixels[:, :, :1])

    @property
    def prompt_frame(self) -> str:
        return f"{DEFAULT_PROMPT_TEMPLATE['template']} {_INTERLEAVE[self.condition_type]}"

    def encode_seeing(
        self, pipe: DiffusionPipeline, prompts: Sequence[str], pictures: Sequence[torch.Tensor] | None
    ) -> list[Text]:
        seen = [Image.new("RGB", (64, 64))] * len(prompts) if pictures is None else [picture(p) for p in pictures]
        found = []
        for prompt, image in zip(prompts, seen, strict=True):  # the pipeline cannot do several where one is cut off
            states, pooled, mask = pipe.encode_prompt(
                image=image,
                prompt=[prompt],
                device=self.device,
                max_sequence_length=self.text_length,
                image_embed_interleave=_INTERLEAVE[self.condition_type],
            )
            [state] = without_padding(states, mask, self.base)
            found.append({"states": state, "pooled": pooled[0].float().cpu().clone()})
        return found

    def count_tokens(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
        # The beginning of what is put around a prompt is not counted as its length, and the end is.
        around = [DEFAULT_PROMPT_TEMPLATE["template"].format(prompt) for prompt in prompts]
        first = DEFAULT_PROMPT_TEMPLATE["crop_start"]
        return [len(ids) - first for ids in pipe.tokenizer(around, verbose=False).input_ids]

    # -- flow matching -------------------------------------------------------------------------------------------------

    def shown(self, latents: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.clean_first:
            return latents
        given, mask = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
        given[:, :, :1], mask[:, :, :1] = conditions["condition"].to(latents), 1
        return torch.cat([latents, given, mask], dim=1)
