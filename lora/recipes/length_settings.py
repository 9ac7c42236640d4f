"""Settings of the recipe `length`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ..config import Settings, setting
from .lora_settings import AdapterSettings, AttentionSettings, LoraSettings


@dataclass(frozen=True)
class LengthSettings(Settings):
    """From which length the model starts, and what it is told of time.

    Args:
        base_frames: pixel frames of the videos that the base was trained on; None for what it makes by default.
        rope: "plain" leaves the rotary embedding as it is; "riflex" lowers its intrinsic frequency, so that it does not
            repeat within a clip (RIFLEx, arXiv 2502.15894).
        component: of RIFLEx: number of the intrinsic component over frames, from 1; None for the first whose period is
            as long as a video of `base_frames`.
    """

    base_frames: int | None = setting(None, low=1)
    rope: Literal["plain", "riflex"] = "plain"
    component: int | None = setting(None, low=1)

    def check(self) -> Iterator[str]:
        if self.component is not None and self.rope == "plain":
            yield "component is of use only with RIFLEx: set rope to riflex, or leave it out."


@dataclass(frozen=True, kw_only=True)
class LengthLoraSettings(LoraSettings):
    """Settings of the recipe `length`: those of `lora`, of which some start from other values, and of length."""

    lora: AdapterSettings = field(default_factory=lambda: AdapterSettings(rank=128))
    attention: AttentionSettings = field(default_factory=lambda: AttentionSettings(method="radial"))
    length: LengthSettings = field(default_factory=LengthSettings)
