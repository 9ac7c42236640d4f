"""Blocks of neighbouring tokens, which stand for themselves by their means; what Sparge and SLA share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .layout import VideoLayout
from .plan import BlockPlan


def in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """`[B, H, N, D]` as `[B, H, n, block, D]`, the last block filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def block_sizes(tokens: int, block: int, device: torch.device) -> torch.Tensor:
    """Tokens of each block, int64; made on the device, since a copy to it would wait."""
    return (tokens - torch.arange(0, tokens, block, device=device)).clamp(max=block)


def block_means(x: torch.Tensor, block: int) -> torch.Tensor:
    """The mean token of each block of `[B, H, N, D]`, `[B, H, n, D]` float32, rounded to the dtype of x as published
    code keeps it; of a last block that is not full, the mean of the tokens that are there.
    """
    whole = x.shape[2] // block * block
    sums = [x[:, :, :whole].unflatten(2, (-1, block)).sum(-2, dtype=torch.float32)]  # without a copy in float32
    if whole < x.shape[2]:
        sums.append(x[:, :, whole:].sum(2, keepdim=True, dtype=torch.float32))
    means = torch.cat(sums, 2) / block_sizes(x.shape[2], block, x.device).unsqueeze(-1)
    return means.to(x.dtype).float()


def centred(k: torch.Tensor) -> torch.Tensor:
    """Keys `[B, H, N, D]` without what is common to all, which no softmax sees."""
    return k - k.mean(dim=2, keepdim=True)


def plan_of_blocks(
    selected: torch.Tensor, block: tuple[int, int], layout: VideoLayout, read: int | None = None
) -> BlockPlan:
    """The plan of blocks of video tokens; text tokens stay outside: they read and are read by everything.

    Args:
        selected: `[B, H, query blocks, key blocks]` bool, of the video alone.
        block: tokens of a query block and of a key block.
        layout: the token grid; text before and after the video is a tile and a cluster each.
        read: the most key blocks that a query block reads, where that is known: tables on a GPU are as large as they
            may have to be, and without it, as for every other block.
    """
    before, after = (int(count > 0) for count in (layout.text_before, layout.text_after))
    most = None
    if read is not None and selected.device.type != "cpu":
        most = min(read + before + after, (selected.shape[-1] + before + after + 1) // 2)
    if not layout.text_tokens:
        return BlockPlan.from_block_mask(selected, *block, layout.tokens, layout.tokens, max_runs=most)
    selected = F.pad(selected, (before, after, before, after), value=True)
    sizes = (block_sizes(layout.video_tokens, size, selected.device) for size in block)
    sizes = (F.pad(x, (before, 0), value=layout.text_before) for x in sizes)
    sizes = (F.pad(x, (0, after), value=layout.text_after) for x in sizes)
    q_sizes, k_sizes = (x.expand(*selected.shape[:2], -1) for x in sizes)
    return BlockPlan.from_clusters(q_sizes, k_sizes, selected, n_q=layout.tokens, n_kv=layout.tokens, max_runs=most)
