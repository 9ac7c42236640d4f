"""Queries, keys and values to measure one attention call on: of the demo model, or imitated heads of large ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch

from vidaccel import DenseSchedule, VideoLayout, accelerate, demo
from vidaccel.attention import BlockPlan, Method, PlanMemory

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class _Capture(Method):
    """Keeps q, k and v of the steps that are wanted, and attends densely."""

    name: ClassVar[str] = "capture"
    summary: ClassVar[str] = "keeps q, k, v"
    good_for: ClassVar[str] = "measurements"
    costs: ClassVar[str] = "memory"
    source: ClassVar[str] = "this project"

    steps: frozenset[int]
    layers: int
    kept: dict[tuple[int, int], Tensors] = field(default_factory=dict, compare=False)
    calls: list[None] = field(default_factory=list, compare=False)

    def plan(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: PlanMemory
    ) -> BlockPlan:
        step, layer = divmod(len(self.calls), self.layers)
        self.calls.append(None)
        if step in self.steps:
            self.kept[step, layer] = tuple(x.half() for x in (q, k, v))
        return BlockPlan.dense(layout.tokens, layout.tokens)


def demo_heads(
    prompts: list[str], frames: int, size: int, num_steps: int, steps: Iterable[int]
) -> tuple[VideoLayout, dict[tuple[int, int], Tensors]]:
    """What the demo model's layers attend with in dense videos, without guidance.

    Args:
        prompts: one batch entry each.
        frames, size: in pixels; `frames` is 4k + 1 and `size` a multiple of 16.
        num_steps: of the sampler; it stops after the last of `steps`.
        steps: counted from 0.

    Returns:
        The layout, and q, k, v `[prompts, H, N, D]` float16 by (step, layer).
    """
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(demo.path())
    pipe.set_progress_bar_config(disable=True)
    capture = _Capture(steps=frozenset(steps), layers=pipe.transformer.config.num_layers)

    def stop(pipeline: WanPipeline, step: int, timestep: Any, tensors: dict) -> dict:
        pipeline._interrupt = step >= max(capture.steps)
        return tensors

    with accelerate(pipe, capture, schedule=DenseSchedule()):
        pipe(
            prompts,
            num_frames=frames,
            height=size,
            width=size,
            num_inference_steps=num_steps,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="latent",
            callback_on_step_end=stop,
        )
    return VideoLayout((frames - 1) // 4 + 1, size // 16, size // 16), capture.kept


# Of the squared norm: bias of the position (time, height, width), content, noise of each token; and the mass that the
# best tenth of the keys shall hold.
KINDS = {
    "spatial": ((1.0, 0.0, 0.0), 0.45, 0.10, 0.93),
    "temporal": ((0.0, 0.5, 0.5), 0.35, 0.10, 0.95),
    "semantic": ((0.05, 0.05, 0.05), 1.0, 0.10, 0.90),
    "mixed": ((0.3, 0.1, 0.1), 0.6, 0.15, 0.88),
    "diffuse": ((0.1, 0.1, 0.1), 0.5, 0.3, 0.45),
}


def synthetic_heads(layout: VideoLayout, kinds: Iterable[str] = KINDS, seed: int = 0, head_dim: int = 128) -> Tensors:
    """Imitations of the heads of large video models.

    Wan's rotary embedding turns a constant vector in q and k into a kernel of the relative position, which makes
    spatial, temporal and mixed heads; to it comes content, objects that move over a background of four regions.

    Returns:
        q, k, v `[1, len(kinds), N, head_dim]` float32.
    """
    generator = torch.Generator().manual_seed(seed)
    turns, edges = _rotary(layout, head_dim)
    made = [_head(layout, KINDS[kind], turns, edges, generator, head_dim) for kind in kinds]
    return tuple(torch.stack(x).unsqueeze(0) for x in zip(*made, strict=True))


def _rotary(layout: VideoLayout, head_dim: int) -> tuple[torch.Tensor, list[int]]:
    """Angles `[N, head_dim / 2]`, and where the pairs of channels of time, height and width begin and end."""
    place = 2 * (head_dim // 6)
    channels = (head_dim - 2 * place, place, place)
    grid = torch.meshgrid(
        *(torch.arange(n).float() for n in (layout.frames, layout.height, layout.width)), indexing="ij"
    )
    turns = [
        axis.reshape(-1, 1) * 10000.0 ** (-torch.arange(0, n, 2) / n) for axis, n in zip(grid, channels, strict=True)
    ]
    return torch.cat(turns, -1), [0, channels[0] // 2, (channels[0] + place) // 2, head_dim // 2]


def _rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * turns.cos() - b * turns.sin(), a * turns.sin() + b * turns.cos()], -1).flatten(-2)


def _content(layout: VideoLayout, generator: torch.Generator, objects: int = 6, width: int = 24) -> torch.Tensor:
    """What each token shows, `[N, width]`: mean 0, deviation 1."""
    axes = (torch.linspace(0, 1 - 1 / n, n) for n in (layout.frames, layout.height, layout.width))
    time, y, x = torch.meshgrid(*axes, indexing="ij")
    parts = torch.randn(4 + objects, width, generator=generator)
    phase, waves = torch.rand(4, generator=generator) * 6.28, torch.randn(4, 2, generator=generator) * 7.5
    regions = [torch.sin(w[0] * y + w[1] * x + p) for w, p in zip(waves, phase, strict=True)]
    shown = torch.stack(regions, -1).mul(2).softmax(-1) @ parts[:4]
    for part in parts[4:]:
        start, speed = torch.rand(2, generator=generator), (torch.rand(2, generator=generator) - 0.5) * 0.6
        radius = 0.06 + 0.1 * torch.rand(1, generator=generator)
        across = [(a - (start[i] + speed[i] * time) % 1) / radius for i, a in enumerate((y, x))]
        inside = torch.sigmoid((1 - (across[0] ** 2 + across[1] ** 2).sqrt()) * radius * 60).unsqueeze(-1)
        shade = torch.stack(across, -1).clamp(-1, 1) @ torch.randn(2, width, generator=generator)
        shown = shown * (1 - inside) + inside * (part + 0.4 * shade)
    shown = shown.view(-1, width) + 0.35 * torch.randn(layout.video_tokens, width, generator=generator)
    return (shown - shown.mean(0)) / shown.std(0)


def _head(
    layout: VideoLayout,
    kind: tuple[tuple[float, float, float], float, float, float],
    turns: torch.Tensor,
    edges: list[int],
    generator: torch.Generator,
    head_dim: int,
) -> Tensors:
    position, content, noise, sharpness = kind
    shown = _content(layout, generator)
    tokens, width = shown.shape
    bias = torch.zeros(head_dim // 2)
    for share, (first, last) in zip(position, pairwise(edges), strict=True):
        falling = torch.exp(-torch.arange(last - first) / ((last - first) / 3.5))
        bias[first:last] = (share * falling / falling.sum()).sqrt()
    bias = torch.stack([bias, torch.zeros_like(bias)], -1).flatten()  # one phase in q and k: the peak is at distance 0
    # Content lies mostly in the channels that turn slowly, as in trained models.
    slow = torch.cat([torch.linspace(0.2, 1.6, b - a) for a, b in pairwise(edges)])
    of_q = torch.randn(width, head_dim, generator=generator) / (width * head_dim) ** 0.5
    of_k = of_q + 0.5 * torch.randn(width, head_dim, generator=generator) / (width * head_dim) ** 0.5
    q, k = (
        _rotate(
            bias
            + content**0.5 * (shown @ mix) * slow.repeat_interleave(2)
            + noise**0.5 * torch.randn(tokens, head_dim, generator=generator) / head_dim**0.5,
            turns,
        )
        for mix in (of_q, of_k)
    )
    v = shown @ torch.randn(width, head_dim, generator=generator) / width**0.5
    v = v + 0.5 * torch.randn(tokens, head_dim, generator=generator)
    low, high = 0.5, 400.0
    some = q[torch.randperm(tokens, generator=generator)[:128]]
    for _ in range(16):  # the scale of the scores at which the best tenth of the keys holds the wanted mass
        factor = (low * high) ** 0.5
        mass = (some @ k.T * (factor / head_dim**0.5)).softmax(-1).topk(tokens // 10, -1).values.sum(-1).mean()
        low, high = (factor, high) if mass < sharpness else (low, factor)
    return q * factor**0.5, k * factor**0.5, v
