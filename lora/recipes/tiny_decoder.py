"""Recipe `tiny_decoder`: trains a `TinyVideoDecoder` for the latents of an autoencoder, on clips of videos."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import nn

from ... import demo
from ...attention.account.timing import Span
from ...autoencoders import AutoencoderDCV
from ...autoencoders.tiny import KNOWN, TinyVideoDecoder, channels_of, compression_of, frames_of, to_transformer
from ...autoencoders.tiny.layers import MemoryBlock, WideMemoryBlock
from ...pipelines.deep_compression.adapted import own_autoencoder
from ...pipelines.deep_compression.adapter_folder import AdapterError, is_adapter, read_facts
from ...pipelines.tiny_decoder.source import TinyDecoderError, check_fits, read_decoder
from ..backbones.folders import load_autoencoder, read_config, write_model
from ..config import ConfigError
from ..data.cache import fingerprint
from ..reconstruction import Wanted, quality
from .reconstructing import TrainReconstruction
from .tiny_decoder_settings import TinyDecoderSettings

__all__ = ["FrozenEncoder", "TinyDecoderSettings", "TrainTinyDecoder"]


class TrainTinyDecoder(TrainReconstruction):
    """Trains a decoder in the layout of TAEHV (github.com/madebyollin/taehv) and writes it to `out/decoder`, which
    `vidaccel.tiny_decoder` puts into a pipeline.

    The EMA weights are written where a phase has `ema_decay`.
    """

    Config = TinyDecoderSettings
    config: TinyDecoderSettings

    def prepare(self) -> None:
        self.vae = self._autoencoder()
        self.check_sizes(self.vae, "model.base")
        super().prepare()

    def _autoencoder(self) -> Any:
        """That of `model.base`, frozen, where it runs."""
        settings = self.config.model
        place = self.pipeline_at(settings.base, "model.base", demo.WAN, demo.DC)
        subfolder: str | None = "vae"
        try:
            if is_adapter(Path(place)):
                place, subfolder = own_autoencoder(Path(place), read_facts(Path(place))["autoencoder"]), None
        except AdapterError as error:
            raise ConfigError(f"model.base: {error}") from error
        name = str(read_config(AutoencoderDCV, place, subfolder).get("_class_name"))
        if name not in KNOWN:
            raise ConfigError(f"model.base: its autoencoder is an {name}; there are decoders for {', '.join(KNOWN)}.")
        cls: Any = AutoencoderDCV if name == AutoencoderDCV.__name__ else getattr(diffusers, name)
        dtype = getattr(torch, settings.autoencoder_dtype)
        vae = load_autoencoder(cls, place, "model.base", subfolder=subfolder, dtype=dtype)
        if self.process.device.type != "cpu":
            vae.enable_slicing()  # the same result, and a batch takes no more memory than a clip
        return vae.to(self.process.device).eval().requires_grad_(False)

    def inputs(self) -> dict[str, str]:
        start = {} if self.config.decoder.start is None else {"decoder.start": fingerprint(self.decoder())}
        return {**self.dataset_input(), "model.base": fingerprint(self.vae), **start}

    def decoder(self) -> TinyVideoDecoder:
        """The decoder as training starts.

        Raises:
            ConfigError: it cannot be read or made, or is not for the autoencoder.
        """
        settings, vae = self.config.decoder, self.vae
        alone, of = frames_of(vae, 1) == 1, type(vae).__name__
        if settings.start is not None:
            try:
                decoder = read_decoder(settings.start).float()
                check_fits(decoder, settings.start, vae, "of model.base")
            except TinyDecoderError as error:
                raise ConfigError(f"decoder.start: {error}") from error
            decoder.register_to_config(first_frame_alone=alone, autoencoder=of)  # a file may not tell
            return decoder.train().requires_grad_(True)
        try:
            decoder = TinyVideoDecoder(
                latent_channels=channels_of(vae),
                block_out_channels=settings.block_out_channels,
                layers_per_block=settings.layers_per_block,
                time_growth=settings.time_growth,
                patch_size=settings.patch_size,
                variant=settings.variant,
                first_frame_alone=alone,
                autoencoder=of,
            )
        except ValueError as error:
            raise ConfigError(f"decoder: {error}") from error
        found = decoder.temporal_compression_ratio, decoder.spatial_compression_ratio
        if found != (wanted := compression_of(vae)):
            raise ConfigError(
                f"decoder: it makes {found[0]} frames and {found[1]} pixels of a side of a latent pixel, of which the "
                f"autoencoder of model.base, an {of}, has made one of {wanted[0]} and {wanted[1]}: "
                f"{_shape_for(*wanted, len(settings.time_growth))}."
            )
        return _begun(decoder)

    def build(self) -> FrozenEncoder:
        return FrozenEncoder(self.vae, self.decoder())

    @property
    def wanted(self) -> Wanted | None:
        return None if self.config.model.target == "frames" else self._decoded

    def _decoded(self, video: torch.Tensor, encoded: Any) -> torch.Tensor:
        return decoded(self.vae, encoded.own)

    def finish(self, trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        model = self.trained(trained)
        folder = Path(self.config.out) / "decoder"
        # A copy, since it is measured in its own precision; and first of all, since measuring may run out of memory.
        # Not through diffusers' own `to`, which warns of modules that this one does not have.
        written = nn.Module.to(copy.deepcopy(model.decoder), getattr(torch, self.config.decoder.file_dtype))
        write_model(written, folder)
        return {"decoder": str(folder), **self.measured(model)}

    @torch.no_grad()
    def measured(self, model: FrozenEncoder) -> dict[str, float]:
        """Figures of the tiny decoder and of the autoencoder's own, which it is not expected to reach, on the clips
        that are held out; and the seconds that a clip takes. Without the autoencoder's own where they take more memory
        than there is: a training with `target: frames` never decodes with it."""
        encoded = [model.encode(clip) for clip in self.validation_clips()]
        figures = self._figures(encoded, lambda latents: model.decode(latents.latent).sample)
        try:
            own = self._figures(encoded, lambda latents: decoded(self.vae, latents.own))
        except torch.cuda.OutOfMemoryError:
            self.process.progress.say(
                "The autoencoder of model.base takes more memory than the GPU has to decode the clips that are "
                "measured, so its own figures are left out; the tiny decoder is written."
            )
            return figures
        return figures | {f"autoencoder_{name}": value for name, value in own.items()}

    def _figures(
        self, encoded: Sequence[SimpleNamespace], decode: Callable[[SimpleNamespace], torch.Tensor]
    ) -> dict[str, float]:
        """`quality` of what is made of the latents of the clips that are held out, and the seconds of the fastest."""
        spans: list[Span] = []

        def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for latents, clip in zip(encoded, self.validation_clips(), strict=True):
                with Span(clip.device) as span:
                    made = decode(latents)
                spans.append(span)
                yield made, clip

        measured = quality(pairs())
        return measured | {"seconds": min(span.seconds() for span in spans)}


class FrozenEncoder(nn.Module):
    """What `Reconstruction` trains: the encoder of an autoencoder that stays as it is, and a tiny decoder.

    Args:
        vae: the autoencoder.
        decoder: of its latents.
    """

    def __init__(self, vae: Any, decoder: TinyVideoDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        self._vae = [vae]  # in a list, so that it is no part of the module: it is not trained, saved or sharded

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        """Of `video [B, 3, T, H, W]` in [-1, 1]: `latent` as the decoder takes it, `own` as the autoencoder does."""
        vae = self._vae[0]
        # In the autoencoder's precision, whatever the decoder is trained in.
        with torch.autocast(video.device.type, enabled=False):
            made = vae.encode(video.to(vae.dtype))
            own = (made.latent if hasattr(made, "latent") else made.latent_dist.mode()).float()
            scaled = self.decoder.config.latents == "autoencoder"
            return SimpleNamespace(latent=own if scaled else to_transformer(vae, own), own=own)

    def decode(self, latent: torch.Tensor) -> SimpleNamespace:
        """`sample [B, 3, T, H, W]`."""
        return SimpleNamespace(sample=self.decoder(latent, frames=frames_of(self._vae[0], latent.shape[2])).float())

    def forward(self, video: torch.Tensor) -> SimpleNamespace:
        return self.decode(self.encode(video).latent)


@torch.no_grad()
def decoded(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    """What an autoencoder makes of its latents `[B, C, T, h, w]`, `[B, 3, F, H, W]` in [-1, 1]."""
    with torch.autocast(latent.device.type, enabled=False):
        noise = (latent.new_zeros(len(latent)).to(vae.dtype),) if vae.config.get("timestep_conditioning") else ()
        return vae.decode(latent.to(vae.dtype), *noise).sample.float().clamp(-1, 1)


def _begun(decoder: TinyVideoDecoder) -> TinyVideoDecoder:
    """A new decoder whose blocks do nothing yet, so that deep ones learn as soon as shallow ones. Changed in place."""
    for layer in decoder.decoder:
        if isinstance(layer, MemoryBlock | WideMemoryBlock):
            for parameter in layer.conv[-1].parameters():
                nn.init.zeros_(parameter)
    return decoder


def _shape_for(time: int, space: int, steps: int) -> str:
    """The settings with which a decoder makes so many frames and pixels of a side, with so many steps if it can."""
    doublings = time.bit_length() - 1
    steps = min(max(steps, doublings), space.bit_length() - 1)
    growth = [1] * (steps - doublings) + [2] * doublings
    return (
        f"set decoder.time_growth to {growth}, decoder.patch_size to {space // 2**steps}, and give "
        f"{steps + 1} numbers in decoder.block_out_channels"
    )
