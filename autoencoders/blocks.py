"""Building blocks of DC-AE-V: chunk-causal convolutions, RMS norm, residual blocks, and steps in size with shortcuts.

Video features are `[B, C, T, H, W]`. Each module takes what its convolutions remember of the chunk before (`Past`: the
last input frame of each, or None for the first chunk) and returns its output with what they remember of this one.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

Past = list[torch.Tensor]

# cuDNN's convolutions index with 32 bits.
MAX_ELEMENTS = 2**31 - 1


class ChunkConv3d(nn.Conv3d):
    """A 3x3x3 convolution that sees one frame of the chunk before, and zeros behind the end of its own chunk.

    Within a chunk it looks both ways in time (DC-VideoGen, section 3.1, "chunk-causal"). Space is padded with zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, bias=bias)

    def forward(self, x: torch.Tensor, past: Past | None, fold: int = 1) -> tuple[torch.Tensor, Past]:
        """One chunk, or `fold` chunks at once.

        Args:
            x: `[B * fold, C, T, H, W]`, the chunks of a video side by side.
            past: the last input frame of the chunk before the first, `[B, C, 1, H, W]`; None starts a video.

        Returns:
            Output of the same length, and the last frame of the last chunk.
        """
        last = x[:, :, -1:]
        chunks = last.unflatten(0, (-1, fold))
        start = torch.zeros_like(chunks[:, :1]) if past is None else past[0].unsqueeze(1)
        before = torch.cat([start, chunks[:, :-1]], dim=1).flatten(0, 1)
        # The copy is what lets go of the chunk itself.
        remembered = chunks[:, -1].clone()
        padded = functional.pad(torch.cat([before, x], dim=2), (1, 1, 1, 1, 0, 1))
        return self._convolve(padded), [remembered]

    def _convolve(self, padded: torch.Tensor) -> torch.Tensor:
        """The convolution, in pieces along time where one call would have too many elements."""
        frames = padded.shape[2] - 2
        of_frame = padded[:, :, 0].numel() * max(1.0, self.out_channels / self.in_channels)
        longest = max(1, int(MAX_ELEMENTS // of_frame) - 2)
        if frames <= longest:
            return super()._conv_forward(padded, self.weight, self.bias)
        starts = range(0, frames, longest)
        pieces = (padded[:, :, s : min(s + longest, frames) + 2] for s in starts)
        return torch.cat([super(ChunkConv3d, self)._conv_forward(p, self.weight, self.bias) for p in pieces], dim=2)


class ChannelRMSNorm(nn.Module):
    """RMS norm over channels with weight and bias; `[B, C, T, H, W]`. The mean square is taken in float32."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A norm with its own dtype keeps no float32 copy of x, which at 720p would be 9 GB.
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[1] + self.eps).to(x.dtype)
        shape = (-1, 1, 1, 1)
        return torch.addcmul(self.bias.view(shape), x * scale, self.weight.view(shape))


class ResBlock(nn.Module):
    """x + norm(conv2(silu(conv1(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ChunkConv3d(channels, channels)
        self.conv2 = ChunkConv3d(channels, channels, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: torch.Tensor, past: Past | None, fold: int = 1) -> tuple[torch.Tensor, Past]:
        first, second = ([past[0]], [past[1]]) if past is not None else (None, None)
        hidden, first = self.conv1(x, first, fold)
        hidden, second = self.conv2(functional.silu(hidden), second, fold)
        return x + self.norm(hidden), first + second


class Downsample(nn.Module):
    """A convolution and pixel-unshuffle; the shortcut unshuffles x and averages neighbouring channels."""

    def __init__(self, in_channels: int, out_channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.out_channels = out_channels
        self.conv = ChunkConv3d(in_channels, out_channels // _volume(factor))

    def forward(self, x: torch.Tensor, past: Past | None, fold: int = 1) -> tuple[torch.Tensor, Past]:
        hidden, past = self.conv(x, past, fold)
        shortcut = unshuffle(x, self.factor).unflatten(1, (self.out_channels, -1)).mean(dim=2)
        return unshuffle(hidden, self.factor) + shortcut, past


class Upsample(nn.Module):
    """A convolution and pixel-shuffle; the shortcut repeats the channels of x and shuffles them."""

    def __init__(self, in_channels: int, out_channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = ChunkConv3d(in_channels, out_channels * _volume(factor))
        self.repeats = out_channels * _volume(factor) // in_channels

    def forward(self, x: torch.Tensor, past: Past | None, fold: int = 1) -> tuple[torch.Tensor, Past]:
        hidden, past = self.conv(x, past, fold)
        shortcut = x.repeat_interleave(self.repeats, dim=1, output_size=x.shape[1] * self.repeats)
        return shuffle(hidden + shortcut, self.factor), past


def unshuffle(x: torch.Tensor, factor: tuple[int, int, int]) -> torch.Tensor:
    """Pixels to channels: `[B, C, T*t, H*h, W*w] -> [B, C*t*h*w, T, H, W]`, channels in the order (C, t, h, w)."""
    t, h, w = factor
    x = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def shuffle(x: torch.Tensor, factor: tuple[int, int, int]) -> torch.Tensor:
    """Channels to pixels, the inverse of `unshuffle`."""
    x = x.unflatten(1, (-1, *factor))
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _volume(factor: tuple[int, int, int]) -> int:
    return factor[0] * factor[1] * factor[2]
