"""RIFLEx: a rotary embedding over frames that does not repeat in videos longer than those of the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..acceleration.families import unwrap
from .settings import Riflex

TRANSFORMERS = ("transformer", "transformer_2")


class RiflexRotary(nn.Module):
    """The rotary embedding of a Wan transformer with RIFLEx, in the place of its own, which stays inside.

    Args:
        own: what the transformer had.
        riflex: settings.

    Raises:
        ValueError: the component that `riflex` names, or looks for, is not there.
    """

    def __init__(self, own: Any, riflex: Riflex) -> None:
        super().__init__()
        self.own, self.riflex = own, riflex
        # Row 1 of the table has the angles of one frame, the highest of which is 1.
        sin, cos = (table[1, : own.t_dim : 2].double().cpu() for table in (own.freqs_sin, own.freqs_cos))
        angles = torch.atan2(sin, cos)
        self.component = riflex.chosen(angles)
        self.frequency = float(angles[self.component - 1])

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `[1, N, 1, D]` for latents `[B, C, T, H, W]`."""
        cos, sin = self.own(hidden_states)
        frames = hidden_states.shape[2] // self.own.patch_size[0]
        frequency = min(self.frequency, 2 * math.pi / frames)
        if frames <= self.riflex.frames or frequency == self.frequency:
            return cos, sin
        position = torch.arange(frames, device=cos.device).repeat_interleave(cos.shape[1] // frames)
        angle = (position.double() * frequency)[None, :, None, None]
        at = slice(2 * self.component - 2, 2 * self.component)
        cos, sin = cos.clone(), sin.clone()
        cos[..., at], sin[..., at] = angle.cos().to(cos), angle.sin().to(sin)
        return cos, sin


class RiflexHandle:
    """RIFLEx at work in transformers. Made by `riflex`; a context manager that removes itself."""

    def __init__(self, transformers: Sequence[Any], settings: Riflex) -> None:
        self.settings = settings
        self._transformers = tuple(transformers)
        self._own = [transformer.rope for transformer in self._transformers]
        made = [RiflexRotary(own, settings) for own in self._own]
        for transformer, rotary in zip(self._transformers, made, strict=True):
            transformer.rope = rotary

    def remove(self) -> None:
        """Put the transformers' own rotary embeddings back. A second call does nothing."""
        for transformer, own in zip(self._transformers, self._own, strict=True):
            if isinstance(transformer.rope, RiflexRotary) and transformer.rope.own is own:
                transformer.rope = own

    def __enter__(self) -> RiflexHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def riflex(pipe: Any, settings: Riflex) -> RiflexHandle:
    """Give the transformers of a Wan pipeline RIFLEx.

    Args:
        pipe: the pipeline, or a transformer alone.
        settings: what the model was trained on.

    Returns:
        A handle with `remove()`.

    Raises:
        TypeError: a transformer without Wan's rotary embedding, or settings that are none.
        ValueError: a component that it does not have.
        RuntimeError: it has RIFLEx already.
    """
    if not isinstance(settings, Riflex):
        raise TypeError(
            f"settings is {settings!r}: give a Riflex with the latent frames that the model was trained on, such as "
            "Riflex(frames=21) for 81 frames of Wan."
        )
    parts = [part for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None] or [pipe]
    transformers = [unwrap(part) for part in parts]
    for transformer in transformers:
        rope = getattr(transformer, "rope", None)
        if isinstance(rope, RiflexRotary):
            raise RuntimeError(f"this {type(transformer).__name__} has RIFLEx already: call remove() on its handle.")
        if refusal := no_riflex(transformer):
            raise TypeError(refusal)
    return RiflexHandle(transformers, settings)


def no_riflex(transformer: Any) -> str:
    """Why a transformer can have no RIFLEx, in words; "" where it can."""
    if type(getattr(transformer, "rope", None)).__name__ in ("WanRotaryPosEmbed", "RiflexRotary"):
        return ""
    return f"RIFLEx is for transformers with the rotary embedding of Wan, which a {type(transformer).__name__} lacks."
