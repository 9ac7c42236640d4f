"""`TinyVideoDecoder`: a small decoder for the latents of a large autoencoder, as a diffusers model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..loaded_whole import LoadedWhole
from .layers import Grow, MemoryBlock, Past, SoftClamp, WideMemoryBlock, with_memory

VARIANTS = ("base", "super")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "leaky_relu": lambda: nn.LeakyReLU(0.2)}
LATENTS = ("transformer", "autoencoder")
CHUNK_BYTES = {"cpu": 2**26}
"""Memory of the largest tensor of a chunk of frames, about, by type of device."""
CHUNK_BYTES_ELSEWHERE = 2**29


class TinyVideoDecoder(LoadedWhole, ModelMixin, ConfigMixin):
    """Latents of a video to its frames in a small part of the time of the autoencoder that they are of.

    The architecture is that of TAEHV (github.com/madebyollin/taehv), whose layers it has under the same names: pictures
    are convolved in two dimensions, with one frame of memory, so a video is decoded chunk by chunk with the same result
    and bounded memory. Decoders for one autoencoder are of no use for another.

    Args:
        latent_channels: of latents.
        block_out_channels: of the stages, small pictures first, and of the last layer; each step between two doubles
            height and width.
        layers_per_block: blocks of each stage.
        time_growth: frames that each step makes of one, 1 or 2.
        patch_size: pixels of a side that the last layer makes of one place.
        variant: "base"; "super" has larger blocks and looks sharper.
        activation: "relu", or "leaky_relu" (of the base variant, LightX2V's decoder for HunyuanVideo 1.5).
        first_frame_alone: the first latent stands for one frame, as in causal autoencoders, so the others of it are
            dropped.
        latents: what is decoded: as the "transformer" makes them, or scaled as the "autoencoder" takes them.
        autoencoder: class in diffusers of the autoencoder whose latents these are; "" where that is not known.

    Raises:
        ValueError: a configuration that does not fit together, with the value and what would fit.
    """

    _no_split_modules = ("MemoryBlock", "WideMemoryBlock")

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        block_out_channels: tuple[int, ...] = (256, 128, 64, 64),
        layers_per_block: int = 3,
        time_growth: tuple[int, ...] = (1, 2, 2),
        patch_size: int = 1,
        variant: str = "base",
        activation: str = "relu",
        first_frame_alone: bool = True,
        latents: str = "transformer",
        autoencoder: str = "",
    ) -> None:
        super().__init__()
        _check(latent_channels, block_out_channels, layers_per_block, time_growth, patch_size)
        for name, value, known in (
            ("variant", variant, VARIANTS),
            ("activation", activation, tuple(ACTIVATIONS)),
            ("latents", latents, LATENTS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}: choose {' or '.join(map(repr, known))}.")
        if variant == "super" and activation != "relu":
            raise ValueError(f"activation is {activation!r}, of the base variant alone: leave it out with super.")
        parts = _base if variant == "base" else _super
        layers = parts(latent_channels, tuple(block_out_channels), layers_per_block, tuple(time_growth), activation)
        channels = 3 * patch_size**2
        self.decoder = nn.Sequential(*layers, nn.Conv2d(block_out_channels[-1], channels, 3, padding=1))
        self.temporal_compression_ratio = math.prod(time_growth)
        self.spatial_compression_ratio = patch_size * 2 ** len(time_growth)

    def frames_of(self, latents: int) -> int:
        """Frames that so many latent frames become."""
        growth = self.temporal_compression_ratio
        return latents * growth - (growth - 1 if self.config.first_frame_alone else 0)

    def forward(self, latents: torch.Tensor, at_once: int | None = None, frames: int | None = None) -> torch.Tensor:
        """Decode.

        Args:
            latents: `[B, C, T, h, w]`, in the scale that `config.latents` says.
            at_once: latent frames of a chunk; None for as many as memory allows that is small beside that of a
                transformer. With gradients, all.
            frames: how many are wanted, the last ones, of T times the growth in time; None for `frames_of(T)`.

        Returns:
            `[B, 3, frames, h * f, w * f]` about [-1, 1], in the dtype of the weights; without gradients, within
            it.

        Raises:
            ValueError: latents that `check_latents` refuses, a chunk below 1, or frames that are not made of them.
        """
        self.check_latents(latents)
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once is {at_once}: a chunk has at least 1 latent frame.")
        wanted = self.frames_of(latents.shape[2]) if frames is None else frames
        most = latents.shape[2] * self.temporal_compression_ratio
        if not 1 <= wanted <= most:
            raise ValueError(f"frames is {wanted}: of {latents.shape[2]} latent frames 1 to {most} are made.")
        chunk = at_once or (latents.shape[2] if torch.is_grad_enabled() else self._frames_at_once(latents))
        past: Past = {}
        made = [self._decode(some, past) for some in latents.to(self.dtype).split(chunk, 2)]
        video = made[0] if len(made) == 1 else torch.cat(made, 1)
        return video[:, video.shape[1] - wanted :].transpose(1, 2)

    def check_latents(self, latents: torch.Tensor) -> None:
        """ValueError for latents of other dimensions or channels, or of nothing."""
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels or 0 in latents.shape:
            raise ValueError(
                f"{type(self).__name__} takes latents [B, {self.config.latent_channels}, T, h, w] with at least 1 of "
                f"each, got {tuple(latents.shape)}."
            )

    def _decode(self, latents: torch.Tensor, past: Past) -> torch.Tensor:
        """`[B, T', 3, H, W]` of a chunk of latents, `[B, C, T, h, w]`."""
        videos = latents.shape[0]
        x = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for place, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock | WideMemoryBlock):
                x = with_memory(layer, x, videos, past, place)
            else:
                x = layer(x)
        if self.config.patch_size > 1:
            x = nn.functional.pixel_shuffle(x, self.config.patch_size)
        x = x.unflatten(0, (videos, -1))
        return 2 * x - 1 if torch.is_grad_enabled() else x.mul_(2).sub_(1).clamp_(-1, 1)

    def _frames_at_once(self, latents: torch.Tensor) -> int:
        """What a block of the last stage reads counts, whose pictures are the largest: its frame and the one before."""
        places = latents.shape[0] * latents.shape[3] * latents.shape[4] * 4 ** len(self.config.time_growth)
        numbers = places * self.temporal_compression_ratio * 2 * self.config.block_out_channels[-2]
        budget = CHUNK_BYTES.get(latents.device.type, CHUNK_BYTES_ELSEWHERE)
        return max(1, budget // (numbers * self.dtype.itemsize))


def _base(
    latent: int, widths: tuple[int, ...], count: int, growth: tuple[int, ...], activation: str
) -> Iterator[nn.Module]:
    yield from (SoftClamp(), nn.Conv2d(latent, widths[0], 3, padding=1), ACTIVATIONS[activation]())
    for frames, width, after in zip(growth, widths, widths[1:], strict=False):
        yield from (MemoryBlock(width, ACTIVATIONS[activation]()) for _ in range(count))
        yield nn.Identity()  # in published files, the place of a layer without weights: `Grow` does its work
        yield Grow(width, frames, 2)
        yield nn.Conv2d(width, after, 3, padding=1, bias=False)
    yield ACTIVATIONS[activation]()


def _super(
    latent: int, widths: tuple[int, ...], count: int, growth: tuple[int, ...], activation: str
) -> Iterator[nn.Module]:
    yield nn.Conv2d(latent, widths[0], 1, bias=False)
    for frames, width, after in zip(growth, widths, widths[1:], strict=False):
        yield from (WideMemoryBlock(width) for _ in range(count))
        yield from (nn.Conv2d(width, 4 * after, 3, padding=1), nn.ReLU(), nn.PixelShuffle(2))
        yield Grow(after, frames, 1)


def _check(latent: Any, widths: Any, count: Any, growth: Any, patch: Any) -> None:
    counts = {"latent_channels": latent, "layers_per_block": count, "patch_size": patch}
    counts |= {f"block_out_channels[{i}]": n for i, n in enumerate(widths)}
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}: it must be a whole number from 1 up.")
    if wrong := [n for n in growth if n not in (1, 2)]:
        raise ValueError(f"time_growth has {wrong[0]!r}: each step makes 1 or 2 frames of one.")
    if not growth or len(widths) != len(growth) + 1:
        raise ValueError(
            f"block_out_channels has {len(widths)} numbers for {len(growth)} of time_growth: it takes one more, that "
            "of the last layer."
        )
