"""Video models as they are, with the autoencoder they were trained with: what HunyuanVideo, CogVideoX and LTX share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from ...attention.layout import VideoLayout
from ..config import ConfigError
from .base import Encoder, ModelOptions, SampleRequest, Text
from .folders import read_config
from .pipeline_own import OwnPipelineModel


class OwnVideoModel(OwnPipelineModel):
    """A video pipeline with one transformer, which is trained.

    Args:
        base: folder or hub id of the pipeline.
        options: without `stage`; `first_frame` is what the class of the pipeline says where a transformer does not do
            both.
    """

    text_pipeline: ClassVar[type[DiffusionPipeline]]
    image_pipeline: ClassVar[type[DiffusionPipeline] | None] = None
    does_both: ClassVar[bool] = False
    """One transformer is for text and for image to video."""
    frame_step: ClassVar[int]
    """Clips have a multiple of this and one frames."""
    frames_cut: int = 0
    """Frames that the pipeline cuts off at the beginning of the videos that it makes."""

    def __init__(self, base: str, options: ModelOptions) -> None:
        first_frame = options.first_frame
        if options.stage is not None:
            raise ConfigError(f"model.stage is {options.stage}, but {base} has one transformer: leave it out.")
        starts = self.text_pipeline.load_config(base)["_class_name"] == getattr(self.image_pipeline, "__name__", None)
        self.image = starts if first_frame is None else first_frame
        if self.image != starts and not self.does_both:
            kind = "starts from" if starts else "takes no"
            raise ConfigError(
                f"model.first_frame is {str(first_frame).lower()}, but {base} {kind} first frames: leave it out."
            )
        self.pipeline_class = self.image_pipeline if self.image and self.image_pipeline else self.text_pipeline
        super().__init__(base, options)
        self.vae = read_config(self.vae_class, base, "vae")
        if (found := self.config.get("_class_name")) != self.transformer_class.__name__:
            raise ConfigError(
                f"model.base: {base} has a {found}; its pipeline takes a {self.transformer_class.__name__}."
            )
        self.check_base()

    @property
    def encoded_as(self) -> str:
        """What kind of latents `latents` makes of the autoencoder's, for the names of those that are kept."""
        return self.text_pipeline.__name__

    @property
    @abstractmethod
    def token(self) -> int:
        """Pixels of a token's side."""

    @abstractmethod
    def grid(self, frames: int, height: int, width: int) -> VideoLayout:
        """The tokens of a clip as self-attention sees them."""

    @abstractmethod
    def latents(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of clips `[B, 3, T, H, W]` in [-1, 1], as the model sees them."""

    def condition(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """What image to video is given of the first frames of clips beside the latents."""
        raise NotImplementedError

    conditioned: bool = False
    """Whether there is a `condition`."""

    @abstractmethod
    def prompt_inputs(self, text: Text, negative: Text, request: SampleRequest) -> dict[str, Any]:
        """Arguments of the pipeline for a prompt, a negative prompt and a guidance scale."""

    # -- OwnModel ------------------------------------------------------------------------------------------------------

    def check_size(self, frames: int, height: int, width: int) -> str | None:
        if (frames - 1) % self.frame_step:
            below = (frames - 1) // self.frame_step * self.frame_step + 1
            takes = f"{self.text_pipeline.__name__} takes {self.frame_step}k + 1"
            return f"clips of {frames} frames do not fit: {takes}; give {below} or {below + self.frame_step}."
        if height % self.token or width % self.token:
            return f"{height}x{width} must be a multiple of {self.token}, the width of a token of {self.base}."
        return None

    def layout(self, frames: int, height: int, width: int) -> VideoLayout:
        return self.grid(frames, height, width)

    def encoder(self) -> OwnVideoEncoder:
        return OwnVideoEncoder(self)

    # -- results -------------------------------------------------------------------------------------------------------

    def sample(self, transformer: nn.Module, texts: tuple[Text, Text], request: SampleRequest) -> torch.Tensor:
        pipe = self.sampler_of(transformer)
        pipe.set_progress_bar_config(disable=True)
        video = pipe(
            height=request.height,
            width=request.width,
            num_frames=request.frames + self.frames_cut,
            num_inference_steps=request.steps,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="pt",
            callback_on_step_end=self.after_step(request),
            **self.prompt_inputs(*texts, request),
            **({"image": picture(request.image)} if self.image else {}),
        ).frames[0]
        return video.transpose(0, 1).float().cpu() * 2 - 1

    def in_pipeline(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Parts of prompts as a pipeline takes them: in a batch of one, in its type, where it runs."""
        return [tensor[None].to(self.device, self.dtype) for tensor in tensors]


def picture(image: torch.Tensor) -> Image.Image:
    """A first frame `[3, H, W]` in [-1, 1], as pipelines take it."""
    return Image.fromarray(((image.permute(1, 2, 0).cpu() + 1) * 127.5).round().byte().numpy())


class OwnVideoEncoder(Encoder):
    """ "latents" `[C, T, h, w]` of the base's own autoencoder, as the model sees them, and for some "condition".

    The means of the autoencoder's distributions, nothing is drawn.
    """

    def __init__(self, model: OwnVideoModel) -> None:
        self.model = model
        self._own: Any = None
        self.parts = ("latents", "condition") if model.image and model.conditioned else ("latents",)
        known = model.fingerprints.of(model.base, "vae", model.autoencoder_dtype, self.loaded_own)
        own = f"{known} {model.autoencoder_dtype}{' tiled' if model.autoencoder_tiling else ''}"
        self.identities = {name: f"{model.encoded_as} {name} 1, {own}" for name in self.parts}

    @property
    def own(self) -> Any:
        """The autoencoder, where it runs."""
        return self.loaded_own().to(self.model.device)

    def loaded_own(self) -> Any:
        if self._own is None:
            model = self.model
            self._own = model.vae_class.from_pretrained(model.base, subfolder="vae", dtype=model.autoencoder_dtype)
            self._own.requires_grad_(False).eval()
            self._own.enable_slicing()
            if model.autoencoder_tiling:
                self._own.enable_tiling()
        return self._own

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, parts: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        makes = {"latents": self.model.latents, "condition": self.model.condition}
        own = self.own
        pixels = pixels.to(self.model.device, own.dtype)
        return {name: makes[name](own, pixels).float() for name in (self.parts if parts is None else parts)}

    def release(self) -> None:
        self._own = None
