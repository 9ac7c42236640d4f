"""`AutoencoderDCV`: the deep-compression video autoencoder DC-AE-V as a diffusers model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook

from .blocks import Past
from .coder import Decoder, Encoder
from .loaded_whole import LoadedWhole
from .presets import preset
from .tiling import Tiles, default_stride, default_tile, run_tiled

logger = logging.getLogger(__name__)

TEMPORAL_COMPRESSION = 4
DERIVED = ("z_dim", "latents_mean", "latents_std", "scale_factor_spatial", "scale_factor_temporal")
_NUMBERS = (
    "in_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "chunk_size",
    "scaling_factor",
    "pad_frames",
)
TAILS = ("cached", "replicate", "independent")


class AutoencoderDCV(LoadedWhole, ModelMixin, AutoencoderMixin, ConfigMixin):
    """DC-AE-V (DC-VideoGen, arXiv 2509.25182, section 3.1): 32x or 64x in space, 4x in time.

    Videos are `[B, 3, T, H, W]` in [-1, 1], latents `[B, C, T/4, H/f, W/f]`. A video is run chunk by chunk, each
    convolution remembering one frame of the chunk before, so memory grows with length by the video alone. There is no
    first frame of its own: T is 4k, not 4k + 1. Latents come unscaled; a transformer sees
    `latent * config.scaling_factor`.

    Args:
        in_channels: of pixels.
        latent_channels: of latents.
        block_out_channels: channels of the stages, full resolution first. The first counts only as a step: half
            resolution is reached by pixel-unshuffle. Each stage but the last halves space, and the last but one is
            followed by the step of 4x in time.
        layers_per_block: residual blocks of each stage; the first must be 0.
        chunk_size: pixel frames of a chunk.
        scaling_factor: 1 / standard deviation of the latents.
        pad_frames: copies of the first frame put before a video, and dropped after decoding; 0 for published DC-AE-V.
        tail: what becomes of frames behind the last whole chunk. "cached" runs a short chunk that remembers the one
            before; "replicate" repeats the last frame to a whole chunk and crops; "independent" runs a short chunk that
            remembers nothing, with the seam that the published code has.

    Raises:
        ValueError: a configuration that does not fit together, with the value and what would fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("ResBlock", "Downsample", "Upsample")
    # Not ResBlock: how many pieces a chunk is run in is part of its graph, so there would be too many graphs of it.
    _repeated_blocks = ("ChannelRMSNorm",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024, 1024),
        layers_per_block: tuple[int, ...] = (0, 5, 10, 4, 4, 4, 4),
        chunk_size: int = 40,
        scaling_factor: float = 1.0,
        pad_frames: int = 0,
        tail: str = "cached",
    ) -> None:
        super().__init__()
        _check_channels(in_channels=in_channels, latent_channels=latent_channels)
        _check_config(block_out_channels, layers_per_block, chunk_size, scaling_factor, pad_frames, tail)
        # As JSON has them, or the model could not be saved.
        self.register_to_config(**{name: _plain(self._internal_dict[name]) for name in _NUMBERS})
        widths, layers = tuple(block_out_channels[1:]), tuple(layers_per_block[1:])
        self.encoder = Encoder(in_channels, latent_channels, widths, layers)
        self.decoder = Decoder(latent_channels, in_channels, widths, layers)
        self.spatial_compression_ratio = self.config.scale_factor_spatial
        self.temporal_compression_ratio = self.config.scale_factor_temporal
        self.use_slicing = False
        self.use_tiling = False
        # Chunks one after the other; when False, all whole chunks of a video side by side, for the same result.
        self.use_framewise_encoding = True
        self.use_framewise_decoding = True
        self.enable_tiling()
        self.disable_tiling()

    @property
    def config(self) -> FrozenDict:
        """The saved configuration, and what follows from it under the names that Wan's pipelines read."""
        channels = self._internal_dict["latent_channels"]
        return FrozenDict(
            {
                **self._internal_dict,
                "z_dim": channels,
                "latents_mean": [0.0] * channels,
                "latents_std": [1 / self._internal_dict["scaling_factor"]] * channels,
                "scale_factor_spatial": 2 ** (len(self._internal_dict["block_out_channels"]) - 2),
                "scale_factor_temporal": TEMPORAL_COMPRESSION,
            }
        )

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """What diffusers builds a model from; that is not what `config` adds for pipelines."""
        own = {name: value for name, value in config_dict.items() if name not in DERIVED}
        return super().extract_init_dict(own, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> AutoencoderDCV:
        """An untrained autoencoder of a published variant, such as "f32t4c32".

        Raises:
            ValueError: no such variant.
        """
        return cls(**{**preset(name), **changes})

    def enable_group_offload(
        self, onload_device: Any, *args: Any, offload_type: str = "block_level", **options: Any
    ) -> None:
        """diffusers' group offloading, layer by layer (`leaf_level`) whatever is asked for: the groups of blocks follow
        `forward`, and pipelines call `encode` and `decode`.
        """
        if offload_type == "block_level":
            options.pop("num_blocks_per_group", None)
        super().enable_group_offload(onload_device, *args, offload_type="leaf_level", **options)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encode and decode in overlapping tiles, so that memory does not grow with the frame's size, but for the
        result and, in float32, the edges that tiles share.

        Args:
            tile_sample_min_height, tile_sample_min_width: pixels of a tile; by default 512, and at least 8 latent
                pixels.
            tile_sample_stride_height, tile_sample_stride_width: pixels between the starts of two tiles; three quarters
                of a tile by default. What overlaps is blended linearly.

        Raises:
            ValueError: a number that is no multiple of the compression, or a stride that exceeds its tile.
        """
        rows = self._tiles(tile_sample_min_height, tile_sample_stride_height)
        self._tile_columns = self._tiles(tile_sample_min_width, tile_sample_stride_width)
        self._tile_rows, self.use_tiling = rows, True

    def _tiles(self, size: int | None = None, stride: int | None = None) -> Tiles:
        """Tiles along one side, of the default size and stride where none is given. Raises as `enable_tiling` does."""
        factor = self.spatial_compression_ratio
        size = default_tile(factor) if size is None else size
        _check_tile(size, factor)
        chosen = stride is not None
        stride = default_stride(size, factor) if stride is None else stride
        _check_tile(stride, factor)
        return Tiles(size, stride, chosen)

    def _resized(self, tiles: Tiles, size: int) -> Tiles:
        """The same of another size, with the stride that was chosen where it fits."""
        _check_tile(size, self.spatial_compression_ratio)
        return self._tiles(size, tiles.stride if tiles.chosen and tiles.stride <= size else None)

    @property
    def tile_sample_min_height(self) -> int:
        """Pixels of a tile, under diffusers' name; set, it keeps a chosen stride that fits, or gets the default."""
        return self._tile_rows.size

    @tile_sample_min_height.setter
    def tile_sample_min_height(self, pixels: int) -> None:
        self._tile_rows = self._resized(self._tile_rows, pixels)

    @property
    def tile_sample_min_width(self) -> int:
        return self._tile_columns.size

    @tile_sample_min_width.setter
    def tile_sample_min_width(self, pixels: int) -> None:
        self._tile_columns = self._resized(self._tile_columns, pixels)

    @property
    def tile_sample_stride_height(self) -> int:
        """Pixels between the starts of two tiles."""
        return self._tile_rows.stride

    @tile_sample_stride_height.setter
    def tile_sample_stride_height(self, pixels: int) -> None:
        self._tile_rows = self._tiles(self._tile_rows.size, pixels)

    @property
    def tile_sample_stride_width(self) -> int:
        return self._tile_columns.stride

    @tile_sample_stride_width.setter
    def tile_sample_stride_width(self, pixels: int) -> None:
        self._tile_columns = self._tiles(self._tile_columns.size, pixels)

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> EncoderOutput | tuple[torch.Tensor]:
        """Latents `[B, C, T/4, H/f, W/f]` of a video `[B, 3, T, H, W]` in [-1, 1], not yet scaled.

        Raises:
            ValueError: T (with `pad_frames`) is no multiple of 4, or H or W none of the compression.
        """
        self._check_video(x)
        if self.config.pad_frames:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.config.pad_frames, -1, -1), x], dim=2)
        latent = self._run(self._encoded, x, 1 / self.spatial_compression_ratio, x.shape[2] // TEMPORAL_COMPRESSION)
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """The video `[B, 3, 4*T, H*f, W*f]` of unscaled latents `[B, C, T, H, W]`.

        Raises:
            ValueError: latents of another number of channels.
        """
        self._check_latent(z)
        sample = self._run(self._decoded, z, self.spatial_compression_ratio, z.shape[2] * TEMPORAL_COMPRESSION)
        sample = sample[:, :, self.config.pad_frames :]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_chunks(self, z: torch.Tensor) -> Iterator[torch.Tensor]:
        """The video of `decode`, chunk by chunk: at most `chunk_size` frames are held at a time.

        Tiles and slices are not used, nor is a tiny decoder that is at work in the place of `decode`. Raises as
        `decode` does.
        """
        self._check_latent(z)
        return self._decode_chunks(z)

    def _decode_chunks(self, z: torch.Tensor) -> Iterator[torch.Tensor]:
        skip = self.config.pad_frames
        for chunk in self._stream(self.decoder, z, self.config.chunk_size // TEMPORAL_COMPRESSION, framewise=True):
            if skip < chunk.shape[2]:
                yield chunk[:, :, skip:]
            skip = max(0, skip - chunk.shape[2])

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode and decode."""
        return self.decode(self.encode(sample).latent, return_dict=return_dict)

    # -- chunks, slices, tiles -----------------------------------------------------------------------------------------

    def _encoded(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        return self._stream(self.encoder, x, self.config.chunk_size, self.use_framewise_encoding)

    def _decoded(self, z: torch.Tensor) -> Iterator[torch.Tensor]:
        size = self.config.chunk_size // TEMPORAL_COMPRESSION
        return self._stream(self.decoder, z, size, self.use_framewise_decoding)

    def _stream(self, coder: Encoder | Decoder, x: torch.Tensor, size: int, framewise: bool) -> Iterator[torch.Tensor]:
        """`coder` of each chunk of `size` frames of `x`, in order."""
        whole = x.shape[2] // size
        past: list[Past] | None = None
        if framewise or whole < 2:
            for number in range(whole):
                out, past = coder(x[:, :, number * size : (number + 1) * size], past)
                yield out
                del out  # while the next one is made
        else:
            folded = x[:, :, : whole * size].unflatten(2, (whole, size)).movedim(2, 1).flatten(0, 1)
            out, past = coder(folded, past, whole)
            yield out.unflatten(0, (-1, whole)).movedim(1, 2).flatten(2, 3)
        rest = x[:, :, whole * size :]
        if not rest.shape[2]:
            return
        if self.config.tail == "replicate":
            missing = size - rest.shape[2]
            out, _ = coder(torch.cat([rest, rest[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2), past)
            yield out[:, :, : out.shape[2] * rest.shape[2] // size]
        else:
            yield coder(rest, past if self.config.tail == "cached" else None)[0]

    def _run(
        self, chunks: Callable[[torch.Tensor], Iterator[torch.Tensor]], x: torch.Tensor, scale: float, frames: int
    ) -> torch.Tensor:
        """What `chunks` makes of `x`, of so many frames, in tiles and slices where these are on."""
        rows, columns = self._tile_rows, self._tile_columns
        if scale > 1:
            rows, columns = rows.scaled(1 / scale), columns.scaled(1 / scale)
        together = 1 if self.use_slicing else x.shape[0]
        if self.use_tiling and len(x) and (x.shape[-2] > rows.size or x.shape[-1] > columns.size):
            return run_tiled(chunks, x, rows, columns, scale, frames, together)
        made = [torch.cat(list(chunks(some)), dim=2) for some in x.split(together)]
        return made[0] if len(made) == 1 else torch.cat(made)

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_video(self, x: torch.Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"A video must be [B, {self.config.in_channels}, T, H, W], not {list(x.shape)}.")
        frames, pad = x.shape[2], self.config.pad_frames
        if frames < 1 or (frames + pad) % TEMPORAL_COMPRESSION:
            low = (frames + pad) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION - pad
            choices = [f for f in (low, low + TEMPORAL_COMPRESSION) if f > 0]
            raise ValueError(
                f"The video has {frames} frames, but this autoencoder takes {TEMPORAL_COMPRESSION}k"
                f"{f' - {pad}' if pad else ''} of them: give {' or '.join(map(str, choices))}."
            )
        factor = self.spatial_compression_ratio
        if x.shape[3] % factor or x.shape[4] % factor or not x.shape[3] or not x.shape[4]:
            raise ValueError(
                f"Frames are {x.shape[3]}x{x.shape[4]} (height x width), but both must be multiples of {factor}: pad "
                f"them to {-(-x.shape[3] // factor) * factor}x{-(-x.shape[4] // factor) * factor} and crop the result."
            )

    def _check_latent(self, z: torch.Tensor) -> None:
        if z.ndim != 5 or z.shape[1] != self.config.latent_channels:
            raise ValueError(f"Latents must be [B, {self.config.latent_channels}, T, H, W], not {list(z.shape)}.")
        if not all(z.shape[2:]):
            raise ValueError(f"Latents {list(z.shape)} have no frames, rows or columns: each must be at least 1.")
        if self.config.pad_frames >= TEMPORAL_COMPRESSION * z.shape[2]:
            raise ValueError(f"Latents of {z.shape[2]} frames are nothing but the {self.config.pad_frames} of padding.")


def _check_tile(pixels: Any, factor: int) -> None:
    if not isinstance(pixels, Integral) or pixels <= 0 or pixels % factor:
        raise ValueError(f"Sizes and strides of tiles must be multiples of {factor} pixels, not {pixels!r}.")


def _plain(value: Any) -> Any:
    """A number, or numbers (a list of a list or an array, otherwise a tuple), without numpy's types."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    return (list if isinstance(value, list) or hasattr(value, "tolist") else tuple)(map(_plain, value))


def _check_whole(**numbers: Any) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}: it must be a whole number.")


def _check_channels(**channels: int) -> None:
    _check_whole(**channels)
    for name, value in channels.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1.")


def _check_config(
    widths: tuple[int, ...], layers: tuple[int, ...], chunk_size: int, scaling_factor: float, pad_frames: int, tail: str
) -> None:
    _check_whole(chunk_size=chunk_size, pad_frames=pad_frames)
    for name, values in (("block_out_channels", widths), ("layers_per_block", layers)):
        _check_whole(**{f"{name}[{number}]": value for number, value in enumerate(values)})
    if len(widths) != len(layers) or len(widths) < 3:
        raise ValueError(
            f"block_out_channels has {len(widths)} entries and layers_per_block {len(layers)}: they need the same "
            "number, at least 3."
        )
    if layers[0] != 0 or min(layers) < 0:
        raise ValueError(f"layers_per_block is {tuple(layers)}: it must start with 0 and have nothing below 0.")
    for number, width in enumerate(widths[1:], start=1):
        if width < 4 or width % 4:
            raise ValueError(f"block_out_channels[{number}] is {width}: it must be a positive multiple of 4.")
        # Every step gathers 4 pixels; the shortcuts average or repeat whole groups of channels.
        if number > 1 and widths[number - 1] * 4 % width:
            raise ValueError(
                f"block_out_channels[{number}] is {width}: it must divide 4 times the one before it, "
                f"{widths[number - 1] * 4}."
            )
    if chunk_size < TEMPORAL_COMPRESSION or chunk_size % TEMPORAL_COMPRESSION:
        raise ValueError(f"chunk_size is {chunk_size}: it must be a positive multiple of {TEMPORAL_COMPRESSION}.")
    is_number = isinstance(scaling_factor, Real) and not isinstance(scaling_factor, bool)
    if not is_number or not 0 < scaling_factor < float("inf"):
        raise ValueError(f"scaling_factor is {scaling_factor!r}: it must be a positive number.")
    if pad_frames < 0:
        raise ValueError(f"pad_frames is {pad_frames}: it must not be negative.")
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}: it must be one of {', '.join(TAILS)}.")
