"""What a row of `models.py` tells of a model: where its video tokens are, and which calls are over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...attention import VideoLayout
from ..report.wording import InputError

Patch = tuple[int, int, int]
LAYERS = (("num_layers", "num_visual_blocks"), ("num_single_layers",))
"""What diffusers calls the number of blocks of the first and of the second kind."""
HEADS = ("num_attention_heads", "attention_head_dim")
"""And what `Geometry.heads` tells."""


class StaysDense(Exception):
    """Nothing in this forward pass can be sparse; the text says why, as the first half of a sentence."""


@dataclass(frozen=True)
class Inputs:
    """What one forward pass of a native model is given, as ComfyUI's APPLY_MODEL wrappers see it.

    Args:
        model: the diffusion model.
        latent: shape `[B, C, T, H, W]` of the noisy latent; of the video, where several latents are packed into one.
        text: tokens of the text condition (`c_crossattn`).
        conditions: the other conditions by name, such as `reference_latent` or `num_tokens`.
    """

    model: Any
    latent: tuple[int, ...]
    text: int
    conditions: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any, x: torch.Tensor, text: torch.Tensor | None, conditions: Mapping[str, Any]) -> Inputs:
        """From the arguments of a wrapper; `latent_shapes` tells the parts of a packed `x`, the video first.

        Of an `x` that is not packed it may tell the whole video's shape, where x is a context window of it.
        """
        shapes = conditions.get("latent_shapes")
        packed = bool(shapes) and x.ndim < len(shapes[0])
        latent = (x.shape[0], *shapes[0][1:]) if packed else tuple(x.shape)
        return cls(model, latent, 0 if text is None else text.shape[1], conditions)

    @property
    def audio(self) -> tuple[int, ...]:
        """Shape of the audio latent that is packed with the video; empty without one."""
        return tuple(next(iter((self.conditions.get("latent_shapes") or ())[1:]), ()))

    def tokens(self, name: str, patch: Patch, padded: bool = True) -> int:
        """Tokens of a condition that is a latent `[B, C, (T,) H, W]`, or of a list of such; 0 without it.

        Args:
            name: of the condition.
            patch: latent frames, rows and columns that make one token.
            padded: whether the model fills up what is no multiple of the patch; otherwise the rest is dropped.
        """
        value = self.conditions.get(name)
        if value is None:
            return 0
        latents = value if isinstance(value, (list, tuple)) else [value]
        return sum(math.prod(grid(x.shape, patch, padded)) for x in latents)

    def rows(self, name: str) -> int:
        """Tokens of a condition that is embedded already, `[..., tokens, C]`; 0 without it."""
        value = self.conditions.get(name)
        return 0 if value is None else value.shape[-2]


def text_and_pictures(inputs: Inputs) -> Collection[int]:
    """Lengths of what cross-attention reads: text, pictures of CLIP, both."""
    pictures = inputs.rows("clip_fea") + inputs.rows("clip_fea_ref")
    return inputs.text, pictures, inputs.text + pictures


def nothing_else(inputs: Inputs) -> Collection[int]:
    """Where text and video are one sequence."""
    return ()


@dataclass(frozen=True)
class Geometry:
    """The self-attention sequence of one class of native models.

    Args:
        family: its name in messages.
        serves: the models that ComfyUI loads into this class, for the documentation.
        sequence: what the sequence holds, in its order, for the documentation.
        patch: model -> latent frames, rows and columns that make one token.
        blocks: attributes with the transformer blocks, in the order in which they run, each with the value of
            `transformer_options["block_type"]` while it does. Several restart `block_index` at 0.
        around: `(inputs, patch) -> (frames, before, after)`: latent frames of the inputs that belong to the video, and
            tokens around it that do not (text, reference frames, context). Raises `StaysDense`.
        extra_blocks: attributes with blocks that run between those under the same `block_index`.
        extra_calls: inputs -> number of a block -> calls that the extra blocks make under its index.
        elsewhere: inputs -> lengths of other sequences (text, audio) that have attention calls of their own.
        silent: `transformer_options` -> blocks whose self-attention makes no call in this forward pass.
        heads: model -> number of attention heads over the video, and channels of each.
        presets: families of pipelines (`acceleration.FAMILIES` by name) that are this model in diffusers, or the one
            that it was made from: their presets fit it.
        patches_output: whether its blocks call `attn1_output_patch`, which other nodes change attention by.
    """

    family: str
    serves: str
    sequence: str
    patch: Callable[[Any], Patch]
    blocks: tuple[tuple[str, str], ...]
    around: Callable[[Inputs, Patch], tuple[int, int, int]]
    extra_blocks: tuple[str, ...] = ()
    extra_calls: Callable[[Inputs], Mapping[int, int]] = lambda inputs: {}
    elsewhere: Callable[[Inputs], Collection[int]] = text_and_pictures
    silent: Callable[[Mapping[str, Any]], Collection[int]] = lambda options: ()
    heads: Callable[[Any], tuple[int, int]] = lambda model: (model.num_heads, model.dim // model.num_heads)
    presets: tuple[str, ...] = ()
    patches_output: bool = False

    def block_offsets(self, model: Any) -> dict[str, int]:
        """Number of the first block of each block type; types that share their numbers are not listed twice."""
        offsets, count = {}, 0
        for name, kind in self.blocks:
            offsets[kind] = count
            count += len(getattr(model, name))
        return offsets

    def main_layers(self, model: Any) -> int:
        """Transformer blocks without the extra ones."""
        return sum(len(getattr(model, name)) for name, _ in self.blocks)

    def layers(self, model: Any) -> int:
        """All blocks whose self-attention runs over the video."""
        return self.main_layers(model) + sum(len(getattr(model, name, ())) for name in self.extra_blocks)

    def with_extra(self, model: Any, layers: Collection[int]) -> list[int]:
        """Some of the main blocks, and the extra ones that run under their index, by the numbers that calls have.

        Of models whose extra blocks run once for each of several contexts: with one.
        """
        made, number = sorted(layers), self.main_layers(model)
        for layer, calls in sorted(self.extra_calls(Inputs(model, (), 0, {})).items()):
            if layer in layers:
                made += range(number, number + calls)
            number += calls
        return made

    def differences(self, model: Any, settings: Mapping[str, Any]) -> list[str]:
        """ "num_layers 40 there, 30 here" of settings of diffusers' transformer that the model has otherwise.

        Args:
            model: of this class. settings: by diffusers' names; those without a counterpart here are left out.
        """
        own: dict[str, int] = {}
        for names, (blocks, _) in zip(LAYERS, self.blocks, strict=False):
            own |= dict.fromkeys(names, len(getattr(model, blocks)))
        if not settings.keys().isdisjoint(HEADS):
            own |= zip(HEADS, self.heads(model), strict=True)
        return [
            f"{name} {settings[name]} there, {here} here"
            for name, here in own.items()
            if settings.get(name, here) != here
        ]

    def video(self, model: Any, latent: Sequence[int]) -> VideoLayout:
        """The tokens of a latent `[B, C, T, H, W]` alone: what else is in the sequence, only a forward pass knows."""
        return VideoLayout(*grid(tuple(latent), self.patch(model)))

    def layout(self, inputs: Inputs) -> VideoLayout:
        """The sequence of a forward pass.

        Raises:
            StaysDense: it holds no video of a known arrangement, or its calls cannot be told from others.
        """
        if len(inputs.latent) != 5:
            shape = "x".join(map(str, inputs.latent))
            raise StaysDense(f"a latent of {shape} is no video that can be read here (an image, or several in one)")
        patch = self.patch(inputs.model)
        frames, before, after = self.around(inputs, patch)
        layout = VideoLayout(
            *grid((*inputs.latent[:2], frames, *inputs.latent[3:]), patch), text_before=before, text_after=after
        )
        if layout.tokens in self.elsewhere(inputs):
            raise StaysDense(
                f"the text or the audio is as long as the video ({layout.tokens} tokens), and their attention calls "
                "cannot be told apart (another size or length of the video helps)"
            )
        return layout


def grid(latent: tuple[int, ...], patch: Patch, padded: bool = True) -> tuple[int, int, int]:
    """Tokens `(frames, rows, columns)` of a latent `[B, C, (T,) H, W]`; what is no multiple of the patch is padded, or
    dropped."""
    sizes = (1, *latent[2:]) if len(latent) == 4 else latent[2:]
    frames, rows, columns = (
        -(-size // step) if padded else size // step for size, step in zip(sizes, patch, strict=True)
    )
    return frames, rows, columns


def unwrap(model: Any) -> Any:
    """The module that `torch.compile` wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)


def diffusion_model_of(model: Any) -> Any:
    """The module that a MODEL samples with, without what `torch.compile` wraps it in.

    Raises:
        InputError: there is no MODEL.
    """
    found = getattr(getattr(model, "model", None), "diffusion_model", None)
    if found is None:
        raise InputError("model is empty: connect the MODEL output of a node such as Load Diffusion Model.")
    return unwrap(found)
