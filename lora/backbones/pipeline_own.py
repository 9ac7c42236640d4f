"""Models as they are whose prompts their own pipeline encodes, of videos or images: what they are made of."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from .base import ModelOptions, OwnModel, SampleRequest
from .pipeline_family import PipelineFamily


class OwnPipelineModel(PipelineFamily, OwnModel):
    """A pipeline with one transformer, which is trained."""

    def __init__(self, base: str, options: ModelOptions) -> None:
        super().__init__(base, options.dtype, options.device, options.merge_text_padding, options.guidance)
        self.autoencoder_dtype, self.fps = options.autoencoder_dtype, options.fps
        self.autoencoder_tiling = options.autoencoder_tiling

    @abstractmethod
    def check_base(self) -> None:
        """Raise ConfigError for a base that cannot be trained."""

    def transformer(self, quantisation: Any = None) -> nn.Module:
        transformer = self.transformer_class.from_pretrained(
            self.base, subfolder="transformer", dtype=self.dtype, quantization_config=quantisation
        )
        return transformer.requires_grad_(False)

    @property
    def lora_loader(self) -> Any:
        return self.pipeline_class

    def skeleton(self) -> nn.Module:
        with init_empty_weights():
            return self.transformer_class.from_config(self.config)

    def sampler(self, transformer: nn.Module) -> DiffusionPipeline:
        """A pipeline with the transformer that is trained, and without what encodes prompts."""
        pipe = self.decoding("scheduler", "vae")
        pipe.to(self.device)  # before the transformer is in it, which may be spread over devices
        pipe.register_modules(transformer=transformer)
        return pipe

    def decoding(self, *keep: str) -> DiffusionPipeline:
        """`load`, with an autoencoder that decodes in tiles where clips are encoded in tiles.

        All are in one precision, that of the frozen weights: several of these pipelines give the autoencoder what has
        the type of the prompts.
        """
        pipe = self.load(*keep)
        if self.autoencoder_tiling:
            pipe.vae.enable_tiling()
        return pipe

    def after_step(self, request: SampleRequest) -> Any:
        """`callback_on_step_end` of a pipeline."""

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            made = request.callback(pipe, step, timestep, tensors)
            # Under mixed precision the model answers in float32, which some pipelines hand to the autoencoder.
            return {**made, "latents": made["latents"].to(pipe.vae.dtype)}

        return callback
