"""What diffusers' Cosmos has torchvision do, a resize of a mask of zeros: torchvision is not among what tests need."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from diffusers.models.transformers import transformer_cosmos

STAND_IN = SimpleNamespace(
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
    functional=SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size=size, mode=interpolation)),
)


def without_torchvision(monkeypatch: Any) -> None:
    """For one test, whether torchvision is installed or not."""
    monkeypatch.setattr(transformer_cosmos, "transforms", STAND_IN, raising=False)


def where_it_is_missing() -> None:
    """For the process."""
    transformer_cosmos.__dict__.setdefault("transforms", STAND_IN)
