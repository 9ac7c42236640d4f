"""How a native model of ComfyUI is described at a tiny size; `comfy_wan.py` and `comfy_others.py` do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One native model, with random weights.

    Args:
        config: ComfyUI's class of supported models. unet: its settings.
        channels: of the latent. text_dim: of the text condition. text: its tokens.
        latent: `(T, H, W)`. other: another such size.
        grid: `(frames, rows, columns)` of the video's tokens. before, after: tokens around them.
        layers: self-attention calls over the video in one forward pass.
        conditions: further entries of a conditioning, made for a latent. mask: of the latent, likewise.
        audio: shape `[B, ...]` of the audio latent that is packed with the video.
        cfg: guidance scale; 1 calls the positive branch alone.
        scale: of the random weights, so large that a change of the attention shows in the result.
        buffers: values of buffers that ComfyUI leaves to the checkpoint.
        needs: a class or word in the source of ComfyUI's `model_base` that older versions lack.
        one_only: whether the model refuses a batch of two.
    """

    config: str
    unet: dict[str, Any]
    latent: Size
    other: Size
    grid: Size
    layers: int
    before: int = 0
    after: int = 0
    channels: int = 16
    text_dim: int = 32
    text: int = 7
    conditions: Callable[[Size], dict[str, Any]] = field(default=lambda latent: {})
    mask: Callable[[Size], torch.Tensor] | None = None
    audio: tuple[int, ...] | None = None
    cfg: float = 3.0
    scale: float = 0.15
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    needs: str = ""
    one_only: bool = False

    @property
    def video(self) -> int:
        """Tokens of the video."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.before + self.video + self.after

    @property
    def density(self) -> float:
        """Of a test: the pairs of what is not video, which stay exact, and 0.6 of the video's own."""
        own = (self.video / self.tokens) ** 2
        return round(1 - 0.4 * own, 2)


def randn(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class ClipVision:
    """What ComfyUI's CLIP vision encoders give, by the names under which models read it."""

    def __init__(self, tokens: int, channels: int) -> None:
        self.penultimate_hidden_states = self.last_hidden_state = randn(1, tokens, channels)
