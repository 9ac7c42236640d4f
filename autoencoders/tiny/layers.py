"""Layers of tiny video decoders: two-dimensional convolutions, and one frame of memory.

Frames are worked on side by side as pictures `[B * T, C, H, W]`, frame by frame within each video.
"""

from __future__ import annotations

import torch
from torch import nn

Past = dict[int, torch.Tensor]
"""By layer, what it read of the last frame of the chunk before, `[B, C, H, W]`."""


class SoftClamp(nn.Module):
    """`3 * tanh(x / 3)`: latents far out of what an encoder gives do no harm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(x / 3)


class MemoryBlock(nn.Module):
    """A residual block that reads each frame beside the one before.

    Args:
        channels: of input and output.
        activation: between the convolutions and at the end.
    """

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            activation,
            nn.Conv2d(channels, channels, 3, padding=1),
            activation,
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.act = activation

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.act(self.conv(torch.cat([x, before], 1)) + x)


class WideMemoryBlock(nn.Module):
    """The same of the larger kind: 7x7 depthwise, then an inverted bottleneck, and no activation at the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, 7, padding=3, groups=2 * channels, bias=False),
            nn.Conv2d(2 * channels, 4 * channels, 1),
            nn.ReLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([x, before], 1)) + x


class Grow(nn.Module):
    """Makes `frames` frames of each, then pictures of `size` times the height and width.

    For a convolution of single pixels this order gives the same as the other, and costs `size ** 2` times less.
    """

    def __init__(self, channels: int, frames: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * frames, 1, bias=False)
        self.frames, self.size = frames, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.frames > 1:
            x = x.unflatten(1, (self.frames, -1)).flatten(0, 1)
        return x if self.size == 1 else nn.functional.interpolate(x, scale_factor=self.size, mode="nearest")


def with_memory(block: nn.Module, x: torch.Tensor, videos: int, past: Past, place: int) -> torch.Tensor:
    """A block with memory over frames `[B * T, C, H, W]` of so many videos; what the next chunk needs goes to `past`.

    Before the first frame of a video there is nothing: zeros.
    """
    frames = x.unflatten(0, (videos, -1))
    first = past.get(place)
    first = torch.zeros_like(frames[:, 0]) if first is None else first
    before = torch.cat([first.unsqueeze(1), frames[:, :-1]], 1).flatten(0, 1)
    past[place] = frames[:, -1].clone()  # a view would keep the whole chunk
    return block(x, before)
