"""Encoders of clips and of prompts that take no model, for what is kept of their results."""

from __future__ import annotations

import torch

from vidaccel.lora.backbones.base import Encoder, TextEncoder


class Rows(Encoder):
    """One part, the means of the rows; counts the clips it was given."""

    parts, identities = ("latents",), {"latents": "rows"}

    def __init__(self) -> None:
        self.clips = 0

    def encode(self, pixels, parts=None):
        self.clips += len(pixels)
        return {"latents": pixels.mean(dim=4)}


class Words(TextEncoder):
    """A state a word, of which it takes five; keeps what it was given."""

    identity, length = "words", 5

    def __init__(self) -> None:
        self.given: list[str] = []

    def encode(self, prompts):
        self.given += prompts
        return [{"states": torch.full((len(prompt.split()), 2), 0.1)} for prompt in prompts]

    def count(self, prompts):
        return [len(prompt.split()) for prompt in prompts]
