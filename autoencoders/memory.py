"""Estimates of the memory that decoding a video takes, from sizes alone. Weights and cuDNN's workspace come on top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin


def video_bytes(frames: int, height: int, width: int, itemsize: int = 4) -> int:
    """The decoded video."""
    return 3 * frames * height * width * itemsize


def default_tile(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels of the tiles that `enable_tiling()` sets, from an autoencoder's config."""
    if not _is_dc(vae):
        return 256, 256
    from .tiling import default_tile

    side = default_tile(_factor(vae))
    return side, side


def decoding_bytes(
    vae: Mapping[str, Any],
    frames: int,
    height: int,
    width: int,
    itemsize: int,
    tile: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    framewise: bool = True,
) -> int:
    """The most that decoding one video holds beside the weights: activations, and the video itself.

    For DC-AE-V this follows what its modules hold. For Wan's autoencoder it is what was counted for its published
    configurations.

    Args:
        vae: config of an `AutoencoderDCV` or of Wan's autoencoder.
        frames, height, width: of the video. DC-AE-V decodes whole latent pixels, so sizes are rounded up to them.
        itemsize: bytes of a value; 2 for bfloat16.
        tile: height and width in pixels of a tile; None decodes frames whole.
        stride: pixels between the starts of two tiles of DC-AE-V, down and across; None for `default_stride`.
        framewise: whether DC-AE-V decodes its chunks one by one, and not all whole ones together.
    """
    rows, columns = (height, width) if tile is None else (min(tile[0], height), min(tile[1], width))
    if not _is_dc(vae):
        video = video_bytes(frames, height, width, itemsize)
        # Wan 2.2's decodes at half resolution. All tiles are kept, with their overlaps, until they are put together.
        per_pixel = 22 if vae.get("patch_size") else 52
        held = per_pixel * (vae.get("decoder_base_dim") or vae["base_dim"]) * rows * columns * itemsize
        return held + 2 * video if (rows, columns) == (height, width) else max(held + 2 * video, 4 * video)
    factor, pad, channels = _factor(vae), vae.get("pad_frames", 0), vae.get("in_channels", 3)
    height, width, rows, columns = (-(-size // factor) * factor for size in (height, width, rows, columns))
    frames = -(-(frames + pad) // 4) * 4
    chunk = vae.get("chunk_size", 40)
    chunk = chunk if vae.get("tail") == "replicate" else min(chunk, frames)
    together = 1 if framewise else max(frames // chunk, 1)
    held = together * _dc_chunk(vae, chunk, rows, columns) * itemsize
    pixel = channels * frames * itemsize
    latents = vae["latent_channels"] * frames * height * width // (4 * factor**2) * itemsize
    if (rows, columns) == (height, width):
        # When all chunks are decoded, they are put together.
        return latents + max(held + pixel * height * width, 2 * pixel * height * width)
    # Where tiles overlap, down and across, the sums are kept in float32 until the next tile is added.
    from .tiling import Tiles, default_stride

    down, across = stride or (default_stride(rows, factor), default_stride(columns, factor))
    shared = Tiles(rows, min(down, rows)).overlap(height) * width + rows * Tiles(columns, min(across, columns)).overlap(
        width
    )
    return latents + pixel * height * width + channels * frames * max(itemsize, 4) * shared + held


def memory_to_decode(vae: ModelMixin, frames: int, height: int, width: int) -> int:
    """`decoding_bytes` of an autoencoder as it is now: its dtype, its tiles if it works in tiles, and its chunks."""
    tile = (vae.tile_sample_min_height, vae.tile_sample_min_width) if vae.use_tiling else None
    stride = (vae._tile_rows.stride, vae._tile_columns.stride) if _is_dc(vae.config) else None
    framewise = not _is_dc(vae.config) or vae.use_framewise_decoding
    return decoding_bytes(vae.config, frames, height, width, vae.dtype.itemsize, tile, stride, framewise)


def _is_dc(vae: Mapping[str, Any]) -> bool:
    return "block_out_channels" in vae


def _factor(vae: Mapping[str, Any]) -> int:
    return 2 ** (len(vae["block_out_channels"]) - 2)


def _dc_chunk(vae: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    """Elements that are held while a chunk of DC-AE-V is decoded."""
    from .blocks import piece_length

    stages, past = [], 0
    widths, layers = vae["block_out_channels"][1:], vae["layers_per_block"][1:]
    for number, (channels, blocks) in enumerate(zip(widths, layers, strict=True)):
        last = number == len(widths) - 1
        shrink = 2 ** (number + (0 if last else 1))
        rows, columns = height // shrink, width // shrink
        frame = channels * rows * columns
        length = frames // 4 if last else frames
        # Each convolution remembers a frame: two a block, one of the step in size, one of the ends.
        past += frame * (2 * blocks + 1)
        piece = piece_length(length, channels * (rows + 2) * (columns + 2))
        # Input and output; beside them a piece with its two frames more and what comes of it, or three in the norm;
        # and the frames that are passed on.
        stages.append(frame * (2 * length + max(2 * piece + 2, 3 * piece) + 4))
    return max(stages) + past
