"""RIFLEx: a rotary embedding over frames that does not repeat in videos longer than those of the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..acceleration.families import unwrap
from ..hooks.removed import refuse_removed
from .settings import Riflex

TRANSFORMERS = ("transformer", "transformer_2")

_WAN, _HUNYUAN = "WanRotaryPosEmbed", "HunyuanVideoRotaryPosEmbed"


class RiflexRotary(nn.Module):
    """The rotary embedding of a Wan or HunyuanVideo transformer with RIFLEx, in the place of its own, which stays
    inside.

    Args:
        own: what the transformer had.
        riflex: settings.

    Raises:
        ValueError: the component that `riflex` names, or looks for, is not there.
    """

    def __init__(self, own: Any, riflex: Riflex) -> None:
        super().__init__()
        self.own, self.riflex = own, riflex
        frequencies = _frequencies(own)
        self.component = riflex.chosen(frequencies)
        self.frequency = float(frequencies[self.component - 1])

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for latents `[B, C, T, H, W]`: `[1, N, 1, D]` of Wan, `[N, D]` of HunyuanVideo."""
        cos, sin = self.own(hidden_states)
        frames = hidden_states.shape[2] // frames_of_a_token(self.own)
        frequency = min(self.frequency, 2 * math.pi / frames)
        if frames <= self.riflex.frames or frequency == self.frequency:
            return cos, sin
        tokens = cos.shape[:-1]
        position = torch.arange(frames, device=cos.device).repeat_interleave(tokens.numel() // frames)
        angle = (position.double() * frequency).view(*tokens, 1)
        at = slice(2 * self.component - 2, 2 * self.component)
        cos, sin = cos.clone(), sin.clone()
        cos[..., at], sin[..., at] = angle.cos().to(cos), angle.sin().to(sin)
        return cos, sin


def _frequencies(own: Any) -> torch.Tensor:
    """Of the components over frames, in radians a latent frame, the highest first."""
    if type(own).__name__ == _HUNYUAN:
        size = own.rope_dim[0]
        return own.theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    # Row 1 of the table has the angles of one frame, the highest of which is 1.
    sin, cos = (table[1, : own.t_dim : 2].double().cpu() for table in (own.freqs_sin, own.freqs_cos))
    return torch.atan2(sin, cos)


def frames_of_a_token(config: Any) -> int:
    """Latent frames of a token, by the config of a transformer or its rotary embedding."""
    if (frames := getattr(config, "patch_size_t", None)) is not None:  # the other number is of height and width
        return int(frames)
    return int(config.patch_size[0])


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
        refuse_removed(any(isinstance(each.rope, RiflexRotary) for each in self._transformers), "vidaccel.riflex")
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def riflex(pipe: Any, settings: Riflex) -> RiflexHandle:
    """Give the transformers of a Wan or HunyuanVideo pipeline RIFLEx.

    Args:
        pipe: the pipeline, or a transformer alone.
        settings: what the model was trained on.

    Returns:
        A handle with `remove()`.

    Raises:
        TypeError: a transformer without the rotary embedding of these, or settings that are none.
        ValueError: a component that it does not have.
        RuntimeError: it has RIFLEx already.
    """
    if not isinstance(settings, Riflex):
        raise TypeError(
            f"settings is {settings!r}: give a Riflex with the latent frames that the model was trained on, such as "
            "Riflex(frames=21) for 81 frames of Wan."
        )
    transformers = _transformers(pipe)
    for transformer in transformers:
        rope = getattr(transformer, "rope", None)
        if isinstance(rope, RiflexRotary):
            raise RuntimeError(
                f"this {type(transformer).__name__} has RIFLEx already: call remove() on its handle, or "
                "vidaccel.restore(pipe)."
            )
        if refusal := no_riflex(transformer):
            raise TypeError(refusal)
    return RiflexHandle(transformers, settings)


def restore(pipe: Any) -> None:
    """Undo `riflex` where the handle is lost; pipe: as it takes. Does nothing otherwise."""
    for transformer in _transformers(pipe):
        if isinstance(rope := getattr(transformer, "rope", None), RiflexRotary):
            transformer.rope = rope.own


def _transformers(pipe: Any) -> list[Any]:
    """Those of a pipeline, or the one that is given, without what wraps them."""
    parts = [part for name in TRANSFORMERS if (part := getattr(pipe, name, None)) is not None]
    return [unwrap(part) for part in parts or [pipe]]


def no_riflex(transformer: Any) -> str:
    """Why a transformer can have no RIFLEx, in words; "" where it can."""
    if type(getattr(transformer, "rope", None)).__name__ in (_WAN, _HUNYUAN, "RiflexRotary"):
        return ""
    kind = type(transformer).__name__
    return f"RIFLEx is for transformers with the rotary embedding of Wan or HunyuanVideo, which a {kind} lacks."
