"""Building blocks of DC-AE-V: chunk-causal convolutions, RMS norm, residual blocks, and steps in size with shortcuts.

Video features are `[B, C, T, H, W]`. Each module takes what its convolutions remember of the chunk before (`Past`: the
last input frame of each; `no_past` starts a video) and returns its output with what they remember of this one.

Without gradients, large chunks run in pieces along time, and what follows a convolution is done to each piece. Then a
module holds its input, its output and a few frames: the published f32t4c32 decodes 720p in 14 GB, not 35 (bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Past = list[torch.Tensor]
Then = Callable[[torch.Tensor, slice], torch.Tensor]

# cuDNN's convolutions index with 32 bits.
MAX_ELEMENTS = 2**31 - 1

# Of the input or output of a piece, where no gradient is needed.
PIECE_ELEMENTS = 2**28


def piece_length(frames: int, of_frame: int, grad: bool = False, step: int = 1) -> int:
    """Frames of a piece of a chunk of `frames`; a convolution's input has two more.

    Args:
        of_frame: elements of a frame of the convolution's input or output, whichever is larger.
        grad: whether gradients are needed. Then pieces save nothing, and only the 32 bits bound them.
        step: pieces are of a multiple of so many frames.
    """
    longest = max(1, MAX_ELEMENTS // max(of_frame, 1) - 2)
    if not grad:
        longest = min(longest, max(2, PIECE_ELEMENTS // max(of_frame, 1) - 2))
    if frames <= longest:
        return frames
    # Of about the same length.
    units, most = -(-frames // step), max(1, longest // step)
    return -(-units // -(-units // most)) * step


def no_past(module: Any, x: torch.Tensor, fold: int = 1) -> Past:
    """What `module` remembers at the start of a video of which `x` is its first input: zeros.

    Tensors, and not None, so that a compiled block runs the first chunk as it does the others.
    """
    shape = (x.shape[0] // fold, x.shape[1], 1, *x.shape[3:])
    return [x.new_zeros(shape) for _ in range(module.convolutions)]


class ChunkConv3d(nn.Conv3d):
    """A 3x3x3 convolution that sees one frame of the chunk before, and zeros behind the end of its own chunk.

    Within a chunk it looks both ways in time (DC-VideoGen, section 3.1, "chunk-causal"). Space is padded with zeros.
    """

    convolutions = 1

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, bias=bias)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        past: Past,
        fold: int = 1,
        then: Then | None = None,
        step: int = 1,
        overwrite: bool = False,
    ) -> tuple[torch.Tensor, Past]:
        """One chunk, or `fold` chunks at once.

        Args:
            x: `[B * fold, C, T, H, W]`, the chunks of a video side by side.
            past: the last input frame of the chunk before the first, `[B, C, 1, H, W]`.
            then: what is done to each piece of the output, given the frames of `x` that it is of.
            step: `then` needs a multiple of so many frames.
            overwrite: the output may take the place of `x`, where there are several pieces and it fits.

        Returns:
            The output of `then` for all frames, and the last frame of the last chunk.
        """
        chunks = x[:, :, -1:].unflatten(0, (-1, fold))
        before = torch.cat([past[0].unsqueeze(1), chunks[:, :-1]], dim=1).flatten(0, 1)
        # The copy is what lets go of the chunk itself.
        remembered = chunks[:, -1].clone()
        grad = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        frames, (height, width) = x.shape[2], x.shape[3:]
        of_frame = x.shape[0] * max(x.shape[1], self.out_channels) * (height + 2) * (width + 2)
        length = piece_length(frames, of_frame, grad, step)
        if frames <= length:
            return self._piece(x, before, slice(0, frames), then), [remembered]
        pieces, out, done = [], None, 0
        for start in range(0, frames, length):
            part = slice(start, min(start + length, frames))
            piece = self._piece(x, before, part, then)
            if grad:
                pieces.append(piece)
                before = x[:, :, part.stop - 1 : part.stop]
                continue
            before = x[:, :, part.stop - 1 : part.stop].clone()
            if out is None:
                longer = (*piece.shape[:2], frames * piece.shape[2] // part.stop, *piece.shape[3:])
                out = x if overwrite and longer == tuple(x.shape) and piece.dtype == x.dtype else _empty(piece, longer)
            out[:, :, done : done + piece.shape[2]] = piece
            done += piece.shape[2]
            del piece
        return torch.cat(pieces, dim=2) if grad else out, [remembered]

    def _piece(self, x: torch.Tensor, before: torch.Tensor, part: slice, then: Then | None) -> torch.Tensor:
        """The output for the frames `part` of `x`, if `before` is the frame before them."""
        seen = x[:, :, part.start : part.stop + 1]
        # One frame in front, and behind the last.
        padded = functional.pad(seen, (1, 1, 1, 1, 1, part.stop - part.start + 1 - seen.shape[2]))
        padded[:, :, :1, 1:-1, 1:-1] = before
        out = self._convolve(padded)
        del padded
        return out if then is None else then(out, part)

    def _convolve(self, padded: torch.Tensor) -> torch.Tensor:
        if not self._better_by_name(padded):
            return super()._conv_forward(padded, self.weight, self.bias)
        ones, zeros = [1] * 3, [0] * 3
        return torch.mkldnn_convolution(padded, self.weight, self.bias, zeros, ones, ones, 1)

    def _better_by_name(self, padded: torch.Tensor) -> bool:
        """Whether oneDNN's kernel has to be called by its name.

        For a single small video torch's own choice on a CPU is a plain loop, which takes up to ten times as long.
        """
        return (
            not torch.compiler.is_compiling()  # first: what follows would break the graph at each convolution
            and padded.device.type == "cpu"
            and padded.shape[0] == 1
            and padded.dtype == self.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and bool(torch.backends.mkldnn.enabled)
            and not torch.is_autocast_enabled("cpu")
        )


class ChannelRMSNorm(nn.Module):
    """RMS norm over channels with weight and bias; `[B, C, T, H, W]`. The mean square is taken in float32 at least."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A norm with its own dtype keeps no float32 copy of x, which at 720p would be 9 GB.
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(norm.square() / x.shape[1] + self.eps).to(x.dtype)
        shape = (-1, 1, 1, 1)
        return torch.addcmul(self.bias.view(shape), x * scale, self.weight.view(shape))


class ResBlock(nn.Module):
    """x + norm(conv2(silu(conv1(x))))."""

    convolutions = 2

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ChunkConv3d(channels, channels)
        self.conv2 = ChunkConv3d(channels, channels, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: torch.Tensor, past: Past, fold: int = 1) -> tuple[torch.Tensor, Past]:
        hidden, first = self.conv1(x, past[:1], fold, lambda piece, part: functional.silu(piece))
        # The output takes the place of `hidden`, which nothing needs any more.
        out, second = self.conv2(
            hidden, past[1:], fold, lambda piece, part: x[:, :, part] + self.norm(piece), overwrite=True
        )
        return out, first + second


class Downsample(nn.Module):
    """A convolution and pixel-unshuffle; the shortcut unshuffles x and averages neighbouring channels."""

    convolutions = 1

    def __init__(self, in_channels: int, out_channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.out_channels = out_channels
        self.conv = ChunkConv3d(in_channels, out_channels // _volume(factor))

    def forward(self, x: torch.Tensor, past: Past, fold: int = 1) -> tuple[torch.Tensor, Past]:
        def add(piece: torch.Tensor, part: slice) -> torch.Tensor:
            shortcut = unshuffle(x[:, :, part], self.factor).unflatten(1, (self.out_channels, -1)).mean(dim=2)
            return unshuffle(piece, self.factor) + shortcut

        return self.conv(x, past, fold, add, step=self.factor[0])


class Upsample(nn.Module):
    """A convolution and pixel-shuffle; the shortcut repeats the channels of x and shuffles them."""

    convolutions = 1

    def __init__(self, in_channels: int, out_channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        self.conv = ChunkConv3d(in_channels, out_channels * _volume(factor))
        self.repeats = out_channels * _volume(factor) // in_channels

    def forward(self, x: torch.Tensor, past: Past, fold: int = 1) -> tuple[torch.Tensor, Past]:
        channels = x.shape[1] * self.repeats

        def add(piece: torch.Tensor, part: slice) -> torch.Tensor:
            shortcut = x[:, :, part].repeat_interleave(self.repeats, dim=1, output_size=channels)
            return shuffle(piece + shortcut, self.factor)

        return self.conv(x, past, fold, add)


def by_pieces(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function` of `x`, where it works on each frame alone and keeps the shape; in pieces if no gradient is needed."""
    frames, grad = x.shape[2], torch.is_grad_enabled()
    length = frames if grad else piece_length(frames, x[:, :, 0].numel())
    if frames <= length:
        return function(x)
    out = _empty(x, tuple(x.shape))
    for start in range(0, frames, length):
        out[:, :, start : start + length] = function(x[:, :, start : start + length])
    return out


def unshuffle(x: torch.Tensor, factor: tuple[int, int, int]) -> torch.Tensor:
    """Pixels to channels: `[B, C, T*t, H*h, W*w] -> [B, C*t*h*w, T, H, W]`, channels in the order (C, t, h, w)."""
    t, h, w = factor
    x = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def shuffle(x: torch.Tensor, factor: tuple[int, int, int]) -> torch.Tensor:
    """Channels to pixels, the inverse of `unshuffle`."""
    x = x.unflatten(1, (-1, *factor))
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _empty(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Not yet written, in the memory format of `like`."""
    last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _volume(factor: tuple[int, int, int]) -> int:
    return factor[0] * factor[1] * factor[2]
