"""Wan moved to a deep-compression autoencoder, trained as it is: DC-VideoGen pipelines, and adapter-only weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from torch import nn

from ...attention.layout import VideoLayout
from ...autoencoders import AutoencoderDCV
from ...pipelines.deep_compression.adapted import adapted_transformer, own_autoencoder, own_base
from ...pipelines.deep_compression.adapter_folder import AdapterError, is_adapter, read_facts
from ..config import ConfigError
from .base import ModelOptions
from .folders import load_autoencoder, read_config, write_pipeline
from .wan_encoding import WanEncoder, WanTextEncoder
from .wan_family import base_pipeline
from .wan_own import STAGES, OwnWan, stage_of


class DCWanModel(OwnWan):
    """A DC-VideoGen pipeline, whose transformer (or one of its two) is trained.

    Args:
        base: folder or hub id of the pipeline, or folder of adapter-only weights.
        options: `stage` is one of `STAGES`; `first_frame` must be what the pipeline does.
    """

    def __init__(self, base: str, options: ModelOptions) -> None:
        super().__init__(base, options)
        first_frame = options.first_frame
        self.adapter = is_adapter(Path(base))
        facts = self._adapter_facts() if self.adapter else {}
        self.index = {} if self.adapter else WanPipeline.load_config(base)
        self.shared = facts["base"] if self.adapter else base
        """Where the text encoder, the scheduler and the image encoder are."""
        self.part, self.levels = stage_of(base, self.index, options.stage)
        named = {"_class_name": WanTransformer3DModel.__name__, **facts.get("transformer", {})}
        self.config = named if self.adapter else read_config(WanTransformer3DModel, base, self.part)
        self.check_options(options)
        self._vae = (facts["vae"], None) if self.adapter else (base, "vae")
        config = read_config(AutoencoderDCV, *self._vae)
        if config.get("_class_name") != "AutoencoderDCV" or config.get("pad_frames"):
            found = config.get("_class_name") if not config.get("pad_frames") else f"pad_frames {config['pad_frames']}"
            raise ConfigError(
                f"model.base: the autoencoder of {base} has {found}; training takes an AutoencoderDCV with pad_frames "
                "0, whose latent frames stand for 4 pixel frames each."
            )
        self.image = self._starts(int(config["latent_channels"]))
        if first_frame is not None and first_frame != self.image:
            kind = "starts from" if self.image else "takes no"
            raise ConfigError(f"model.first_frame is {str(first_frame).lower()}, but {base} {kind} first frames.")
        if self.index.get("expand_timesteps"):
            raise ConfigError(
                f"model.base: {base} has a timestep for each token, which DCVideoGenPipeline does not do."
            )
        location, subfolder = self._vae
        how = {"subfolder": subfolder, "dtype": options.autoencoder_dtype}
        self.autoencoder = load_autoencoder(AutoencoderDCV, location, "model.base", **how)
        self.autoencoder.requires_grad_(False).eval()
        self.autoencoder.enable_slicing()  # the same result, and a batch takes no more memory than a clip
        if options.autoencoder_tiling:
            self.autoencoder.enable_tiling()

    def _adapter_facts(self) -> dict[str, Any]:
        """What adapter-only weights belong to: under "base" where that is, under "vae" where their autoencoder is."""
        try:
            facts = read_facts(Path(self.base))
            vae = own_autoencoder(Path(self.base), facts["autoencoder"])
            return {**facts, "base": own_base(Path(self.base), facts["base"]), "vae": vae}
        except AdapterError as error:
            raise ConfigError(f"model.base: {error}") from error

    def _starts(self, channels: int) -> bool:
        """Whether the model starts from a first frame; its autoencoder has latents of so many channels."""
        given, made = int(self.config["in_channels"]), int(self.config["out_channels"])
        if made != channels or given not in (channels, 2 * channels + 4):
            raise ConfigError(
                f"model.base: the transformer of {self.base} takes {given} channels and makes {made}, and with its "
                f"autoencoder of {channels} it must make {channels} and take as many, or {2 * channels + 4} with a "
                "first frame: they do not belong together."
            )
        return given != channels

    @property
    def _token(self) -> int:
        """Pixels of a token's side."""
        return int(self.autoencoder.spatial_compression_ratio * self.config["patch_size"][1])

    def check_size(self, frames: int, height: int, width: int) -> str | None:
        if frames % 4:
            return f"clips of {frames} frames do not fit: their number must be a multiple of 4."
        if height % self._token or width % self._token:
            return f"{height}x{width} must be a multiple of {self._token}, the width of a token of {self.base}."
        return None

    def layout(self, frames: int, height: int, width: int) -> VideoLayout:
        return VideoLayout(frames // 4, height // self._token, width // self._token)

    def transformer(self, quantisation: Any = None) -> nn.Module:
        if self.adapter:
            if quantisation is not None:
                raise ConfigError(
                    f"model.quantise: the weights of {self.base} are those of {self.shared} with an adapter merged, "
                    "which cannot be quantised: save the pipeline with save_pretrained, and give that folder."
                )
            return self.loaded(adapted_transformer(Path(self.base), self.shared, self.dtype))
        transformer = WanTransformer3DModel.from_pretrained(
            self.base, subfolder=self.part, dtype=self.dtype, quantization_config=quantisation
        )
        return self.loaded(transformer)

    def text_encoder(self) -> WanTextEncoder:
        return WanTextEncoder(self.shared, self.dtype, self.device, self.text_length, self.fingerprints)

    def encoder(self) -> WanEncoder:
        embeds = ("image_embeds",) if self.image and self.config.get("image_dim") is not None else ()
        condition = ("condition",) if self.image else ()
        parts = ("latents", *condition, *embeds)
        return WanEncoder(self.shared, self.autoencoder, parts, self.device, self.fingerprints)

    def sampler(self, transformer: nn.Module) -> WanPipeline | WanImageToVideoPipeline:
        others = [name for name in STAGES.values() if name != self.part and (self.index.get(name) or [None])[0]]
        eyes = ("image_encoder", "image_processor") if self.config.get("image_dim") is not None else ()
        pipe = self._pipeline(("scheduler", *others, *eyes))
        pipe.to(self.device)  # before the transformer is in it, which may be spread over devices
        pipe.register_modules(**{self.part: transformer})
        return pipe

    def save(self, transformer: nn.Module, folder: Path) -> None:
        index = WanPipeline.load_config(self.shared)
        parts = [name for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0]]
        pipe = self._pipeline(("scheduler",))
        pipe.register_modules(**{self.part: transformer.to("cpu")})
        vae = self._vae[0] if self.adapter else None
        own = ["scheduler", self.part]
        if vae is None:
            pipe.register_modules(vae=None)  # the base's, as the text encoder is
        else:
            own.append("vae")
        write_pipeline(pipe, folder, self.shared, [name for name in parts if name not in own], vae)

    def _pipeline(self, keep: Sequence[str]) -> WanPipeline | WanImageToVideoPipeline:
        """The pipeline with the autoencoder, some of the shared components, and no transformer that is trained."""
        parts = base_pipeline(self.shared, self.image, keep, self.dtype).components
        if self.image:  # whose module complains on import where torchvision is missing
            from ...pipelines.deep_compression.image_to_video import DCVideoGenImageToVideoPipeline as cls
        else:
            from ...pipelines.deep_compression.text_to_video import DCVideoGenPipeline as cls
        return cls(**{**parts, "vae": self.autoencoder}, boundary_ratio=self.index.get("boundary_ratio"))
