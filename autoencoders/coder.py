"""Encoder and decoder of DC-AE-V: what runs on one chunk of a video."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .blocks import (
    ChannelRMSNorm,
    ChunkConv3d,
    Downsample,
    Past,
    ResBlock,
    Upsample,
    by_pieces,
    no_past,
    shuffle,
    unshuffle,
)

SPACE = (1, 2, 2)
TIME = (4, 1, 1)


def steps(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """The factor (time, height, width) between each stage and the next, outermost first."""
    return [SPACE] * (len(widths) - 2) + [TIME]


class Stage(nn.Module):
    """Residual blocks, with a step in size before or after them.

    Args:
        channels: of the residual blocks.
        layers: how many there are.
        upsampler, downsampler: the step before or behind them.
    """

    def __init__(
        self, channels: int, layers: int, upsampler: Upsample | None = None, downsampler: Downsample | None = None
    ) -> None:
        super().__init__()
        self.upsampler = upsampler
        self.resnets = nn.ModuleList(ResBlock(channels) for _ in range(layers))
        self.downsampler = downsampler

    def parts(self) -> list[nn.Module]:
        """The modules in the order in which they run."""
        return [part for part in (self.upsampler, *self.resnets, self.downsampler) if part is not None]


class _Coder(nn.Module):
    """What encoder and decoder have in common: a chain of modules, each with its past."""

    _gradient_checkpointing_func: Callable[..., Any]  # set by diffusers

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def _run(
        self, chain: Sequence[nn.Module], x: torch.Tensor, past: list[Past] | None, fold: int
    ) -> tuple[torch.Tensor, list[Past]]:
        remembered = []
        for module in chain:
            before = _taken(past, module, x, fold)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, now = self._gradient_checkpointing_func(module, x, before, fold)
            else:
                x, now = module(x, before, fold)
            remembered.append(now)
        return x, remembered


def _parts(stages: Iterable[Any]) -> list[nn.Module]:
    """The blocks of all stages, one behind the other."""
    return [part for stage in stages for part in stage.parts()]


def _taken(past: list[Past] | None, module: Any, x: torch.Tensor, fold: int) -> Past:
    """The first of `past`, which goes out of the list so that it is freed when it is used."""
    return no_past(module, x, fold) if past is None else past.pop(0)


class UnshuffledConv(ChunkConv3d):
    """A convolution whose output is unshuffled to half resolution, before it is ever whole at full resolution."""

    def forward(self, x: torch.Tensor, past: Past, fold: int = 1) -> tuple[torch.Tensor, Past]:  # type: ignore[override]
        return super().forward(x, past, fold, lambda piece, part: unshuffle(piece, SPACE))


class Encoder(_Coder):
    """Pixels to latents.

    Args:
        in_channels, latent_channels: of pixels and of latents.
        widths: channels of the stages, from half resolution inwards.
        layers: residual blocks of each.
    """

    def __init__(self, in_channels: int, latent_channels: int, widths: Sequence[int], layers: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = UnshuffledConv(in_channels, widths[0] // 4)
        factors = steps(widths)
        self.down_blocks = nn.ModuleList()
        for number, width in enumerate(widths):
            last = number == len(widths) - 1
            down = None if last else Downsample(width, widths[number + 1], factors[number])
            self.down_blocks.append(Stage(width, layers[number], downsampler=down))
        self.conv_out = ChunkConv3d(widths[-1], latent_channels)

    def forward(
        self, x: torch.Tensor, past: list[Past] | None = None, fold: int = 1
    ) -> tuple[torch.Tensor, list[Past]]:
        """`[B, in_channels, T, H, W] -> [B, latent_channels, T/4, H/f, W/f]`, and what the next chunk remembers.

        `past` is what the chunk before returned, and is used up; None starts a video.
        """
        return self._run([self.conv_in, *_parts(self.down_blocks), self.conv_out], x, past, fold)


class Decoder(_Coder):
    """Latents to pixels: the encoder mirrored.

    Args:
        latent_channels, out_channels: of latents and of pixels.
        widths: channels of the stages, from half resolution inwards.
        layers: residual blocks of each.
    """

    def __init__(self, latent_channels: int, out_channels: int, widths: Sequence[int], layers: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = ChunkConv3d(latent_channels, widths[-1])
        factors = steps(widths)
        self.up_blocks = nn.ModuleList()
        for number in reversed(range(len(widths))):
            last = number == len(widths) - 1
            up = None if last else Upsample(widths[number + 1], widths[number], factors[number])
            self.up_blocks.append(Stage(widths[number], layers[number], upsampler=up))
        self.norm_out = ChannelRMSNorm(widths[0])
        self.conv_out = ChunkConv3d(widths[0], out_channels * 4)

    def forward(
        self, x: torch.Tensor, past: list[Past] | None = None, fold: int = 1
    ) -> tuple[torch.Tensor, list[Past]]:
        """`[B, latent_channels, T, H, W] -> [B, out_channels, 4*T, H*f, W*f]`, and what the next chunk remembers.

        `past` is what the chunk before returned, and is used up; None starts a video.
        """
        x, rest = self._run([self.conv_in, *_parts(self.up_blocks)], x, past, fold)
        x = by_pieces(lambda piece: functional.silu(self.norm_out(piece)), x)
        x, last = self.conv_out(
            x, _taken(past, self.conv_out, x, fold), fold, lambda piece, part: shuffle(piece, SPACE)
        )
        return x, [*rest, last]
