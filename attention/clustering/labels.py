"""Tokens sorted by the cluster that they are in."""

from __future__ import annotations

import torch


def label_dtype(clusters: int) -> torch.dtype:
    """Of the labels of so many clusters. Few digits sort faster: a radix sort of 64 bits makes four times the passes of
    one of 16."""
    return torch.int16 if clusters < 2**15 else torch.int64


def sort_labels(labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels `[B, H, N]` in rising order, and the tokens in that order, `[B, H, N]` int64; equals stay in sequence."""
    ordered, order = labels.to(label_dtype(clusters)).sort(dim=-1, stable=True)
    return ordered, order
