"""Prompts of fewer tokens in training.

Models are trained with prompts filled up to 128 to 1,024 tokens. Those of the tests have ten, and with more a tiny run
spends half its time in the text encoder and in cross-attention to padding.
"""

from __future__ import annotations

from collections.abc import Callable

from vidaccel.lora.backbones.wan_family import WanFamily

TOKENS = 32


def shorten(set_attribute: Callable[[type, str, int], None] = setattr) -> None:
    """Fill prompts of Wan models up to `TOKENS`, in this process."""
    set_attribute(WanFamily, "text_length", TOKENS)
