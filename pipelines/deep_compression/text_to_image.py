"""DC-Gen: image pipelines whose transformer works in the latent space of a deep-compression autoencoder.

Source: DC-Gen (arXiv 2509.25180). Everything but sizes and decoding is diffusers' own: prompts, guidance, LoRA,
offloading.
"""

# No `from __future__ import annotations`: diffusers reads the types of the constructors' arguments.
import math
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
)
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.pipelines.sana.pipeline_output import SanaPipelineOutput
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from ...autoencoders.dtypes import resolve_dtypes
from ..files.run_folder import chosen_model
from .adapted import load_adapted, own_base
from .adapted_images import FLUX, SANA
from .adapter_folder import AdapterError, is_adapter, is_of_pictures, read_facts
from .canvas import Canvas
from .given_latents import FiniteEmbeddings, check_latents
from .outputs import ToldPictures, ToldSanaPictures, check_output, processor_for
from .published_files import hub_options, read_json

_LATENTS = "picture takes {}: [pictures, channels, rows, columns]"
_TOKENS = "picture takes tokens {}: [pictures, rows * columns, channels]"


def _canvas(pipe: Any, height: int, width: int, channels: int, multiple: int = 1) -> Canvas:
    """The canvas of a picture, whose sizes are also a multiple of `multiple`.

    Raises:
        ValueError: a size under 1, or parts that do not belong together.
    """
    _check_autoencoder(type(pipe).__name__, pipe.vae)
    if pipe.vae is None:
        raise ValueError(f"{type(pipe).__name__} has no autoencoder: set pipe.vae to an AutoencoderDC.")
    if channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"The transformer makes {channels} channels and the autoencoder has {pipe.vae.config.latent_channels}: "
            "they do not belong together."
        )
    # Of the autoencoder that is there now: diffusers reads these when a pipeline is made, maybe with another one.
    ratio = pipe.vae.spatial_compression_ratio
    pipe.vae_scale_factor = ratio // pipe._patch
    pipe.image_processor = processor_for(pipe, pipe.image_processor, pipe._processor_class, ratio)
    factor = math.lcm(ratio, multiple)
    return Canvas.for_video(1, height, width, patch=(1, 1, 1), spatial=factor, temporal=1)


def _transformer(pipe: Any) -> Any:
    if pipe.transformer is None:
        raise ValueError(f"{type(pipe).__name__} has no transformer: load it with one.")
    return pipe.transformer


def _check_autoencoder(pipeline_class: str, vae: Any) -> None:
    """ValueError for an autoencoder that does not say how much it compresses, as those of the stock models."""
    if vae is not None and not hasattr(vae, "spatial_compression_ratio"):
        raise ValueError(
            f"The vae of {pipeline_class} is {type(vae).__name__}: DC-Gen is for models with an AutoencoderDC; a stock "
            f"one is loaded with diffusers' own {pipeline_class.removeprefix('DCGen')}."
        )


def _cropped(images: Any, canvas: Canvas) -> Any:
    """Pictures as diffusers' image processor gives them (a list, `[B, H, W, C]`, `[B, C, H, W]`), cropped."""
    if isinstance(images, list):
        return [canvas.crop([[image]])[0][0] for image in images]
    return canvas.crop(images[:, None])[:, 0]


class DCGenFluxPipeline(FiniteEmbeddings, FluxPipeline):
    """FLUX with `AutoencoderDC`: each latent pixel (32x32 or 64x64 pixels) is a token, without the packing of 2x2."""

    # The parent counts two latent pixels a token: half the factor gives one token a latent pixel, of all channels.
    _patch = 2
    _processor_class = ToldPictures

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderDC,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
    ) -> None:
        _check_autoencoder(type(self).__name__, vae)
        # Not the parent's constructor, which reads a field that only FLUX's own autoencoder has.
        DiffusionPipeline.__init__(self)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        # As `_canvas` has them, which sets them to the autoencoder that is there then.
        ratio = vae.spatial_compression_ratio if vae is not None else 32
        self.vae_scale_factor = ratio // self._patch
        self.image_processor = ToldPictures(vae_scale_factor=ratio)
        self.tokenizer_max_length = tokenizer.model_max_length if tokenizer is not None else 77
        self.default_sample_size = 64

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        height: int = 1024,
        width: int = 1024,
        output_type: str | None = "pil",
        return_dict: bool = True,
        **kwargs: Any,
    ) -> FluxPipelineOutput | tuple:
        """Generate pictures. Arguments are those of `diffusers.FluxPipeline`, but for:

        Args:
            height, width: pixels, any number. What the model cannot do is made larger and cropped in the middle.
            output_type: "latent" gives scaled latents `[B, C, H/f, W/f]` of the canvas.
            latents: noise, as "latent" gives latents or as tokens, `[B, H/f * W/f, C]`.

        Raises:
            ValueError: sizes under 1, an unknown `output_type`, latents of another shape, latents or embeddings that
                are not finite, or parts that do not belong together.
        """
        check_output(output_type)
        canvas = _canvas(self, height, width, _transformer(self).out_channels)
        size = {"height": canvas.height, "width": canvas.width}
        tokens = super().__call__(*args, **size, output_type="latent", return_dict=False, **kwargs)[0]
        factor = self.vae.spatial_compression_ratio
        images = tokens.transpose(1, 2).unflatten(2, (canvas.height // factor, canvas.width // factor))
        if output_type != "latent":
            latents = (images / self.vae.config.scaling_factor).to(self.vae.dtype)
            images = self.vae.decode(latents, return_dict=False)[0]
            images = _cropped(self.image_processor.postprocess(images, output_type=output_type), canvas)
            self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=images) if return_dict else (images,)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise as tokens `[B, H/f * W/f, C]`, and the place of each.

        Raises:
            ValueError: latents that `check_latents` refuses.
        """
        if latents is not None:
            factor, channels = self.vae.spatial_compression_ratio, self.vae.config.latent_channels
            rows, columns = height // factor, width // factor
            if isinstance(latents, torch.Tensor) and latents.ndim == 3:
                check_latents(latents, (batch_size, rows * columns, channels), _TOKENS)
            else:
                check_latents(latents, (batch_size, channels, rows, columns), _LATENTS)
                latents = latents.flatten(2).transpose(1, 2)
        return super().prepare_latents(
            batch_size, num_channels_latents, height, width, dtype, device, generator, latents
        )


class DCGenSanaPipeline(FiniteEmbeddings, SanaPipeline):
    """SANA with a deeper `AutoencoderDC` (f64c128) than its own (f32c32), at any size."""

    image_processor: PixArtImageProcessor
    _patch = 1
    _processor_class = ToldSanaPictures

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        height: int = 1024,
        width: int = 1024,
        output_type: str | None = "pil",
        return_dict: bool = True,
        use_resolution_binning: bool = False,
        **kwargs: Any,
    ) -> SanaPipelineOutput | tuple:
        """Generate pictures. Arguments are those of `diffusers.SanaPipeline`, but for:

        Args:
            height, width: pixels, any number. What the model cannot do is made larger and cropped in the middle.
            output_type: "latent" gives scaled latents `[B, C, H/f, W/f]` of the canvas.
            latents: noise `[B, C, H/f, W/f]`.
            use_resolution_binning: off, since it would make another size and scale the picture.

        Raises:
            ValueError: sizes under 1, an unknown `output_type`, latents of another shape, latents or embeddings that
                are not finite, or parts that do not belong together.
        """
        check_output(output_type)
        canvas = _canvas(self, height, width, _transformer(self).config.out_channels, multiple=32)
        images = super().__call__(
            *args,
            height=canvas.height,
            width=canvas.width,
            output_type=output_type,
            return_dict=False,
            use_resolution_binning=use_resolution_binning,
            **kwargs,
        )[0]
        if output_type != "latent":
            images = _cropped(images, canvas)
        return SanaPipelineOutput(images=images) if return_dict else (images,)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise `[B, C, H/f, W/f]`.

        Raises:
            ValueError: latents that `check_latents` refuses.
        """
        if latents is not None:
            factor = self.vae_scale_factor
            shape = (batch_size, num_channels_latents, height // factor, width // factor)
            check_latents(latents, shape, _LATENTS)
        return super().prepare_latents(
            batch_size, num_channels_latents, height, width, dtype, device, generator, latents
        )


_FAMILIES = {
    "DCGenFluxPipeline": DCGenFluxPipeline,
    "FluxPipeline": DCGenFluxPipeline,
    "DCGenSanaPipeline": DCGenSanaPipeline,
    "SanaPipeline": DCGenSanaPipeline,
}
_KINDS = {DCGenFluxPipeline: FLUX, DCGenSanaPipeline: SANA}
_OF_ADAPTERS = ("base", "autoencoder")


class DCGenPipeline:
    """Finds the pipeline of a DC-Gen model, as diffusers' `AutoPipeline` classes do."""

    def __init__(self) -> None:
        raise OSError("Load a model with DCGenPipeline.from_pretrained(...), or use the class of its family directly.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline:
        """Load a folder or hub id, or the folder of a training; arguments are those of
        `DiffusionPipeline.from_pretrained`.

        A dtype may be a name, such as "bfloat16". A folder with adapter-only weights (`adapter/` of a run or a
        checkpoint of the recipe `ae_adapt`, or what `vidaccel.lora.export` wrote) is loaded onto the base that it
        names; `base=` and `autoencoder=` give others.

        Raises:
            ValueError: a dtype whose name is unknown, a pipeline of another family, a model_index.json that cannot be
                read, an adapter that does not fit, `base=` and `autoencoder=` for what is none, or a training that
                has made no model.
            OSError: there is no such model.
        """
        kwargs = resolve_dtypes(kwargs)
        folder = Path(chosen_model(pretrained_model_name_or_path)).expanduser()
        if folder.is_dir() and is_adapter(folder):
            facts = read_facts(folder)
            if not is_of_pictures(facts["transformer"]):
                raise AdapterError(
                    f"{folder} is an adapter for videos: load it with DCVideoGenPipeline, or where it starts from an "
                    "image with DCVideoGenImageToVideoPipeline."
                )
            family = _family(own_base(folder, facts["base"], kwargs.get("base")), kwargs)
            return load_adapted(family, folder, kind=_KINDS[family], **kwargs)
        if unused := [f"{name}=" for name in _OF_ADAPTERS if kwargs.pop(name, None) is not None]:
            raise ValueError(
                f"{pretrained_model_name_or_path} is loaded as a diffusers pipeline, which has no use for "
                f"{' and '.join(unused)}: give components instead, such as vae=."
            )
        location = folder if folder.is_dir() else pretrained_model_name_or_path
        return _family(location, kwargs).from_pretrained(location, **kwargs)


def _family(location: str | os.PathLike, options: dict[str, Any]) -> Any:
    """The class for a pipeline, which may be a stock one.

    Raises:
        ValueError: it is of another family.
        OSError: there is none.
    """
    folder = Path(location)
    if folder.is_dir():
        index = _read_index(folder / "model_index.json")
    else:
        index = DiffusionPipeline.load_config(location, **hub_options(options, "revision"))
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) else name
    if name not in _FAMILIES:
        kind = f"is a {name}" if name else "does not say in model_index.json which pipeline it is (_class_name)"
        raise ValueError(f"{location} {kind}; DC-Gen here is for FLUX and SANA: {', '.join(_FAMILIES)}.")
    return _FAMILIES[name]


def _read_index(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}: give the folder of a pipeline, which holds it.")
    return read_json(file)


__all__ = ["DCGenFluxPipeline", "DCGenPipeline", "DCGenSanaPipeline"]
