"""Where the video tokens are in the sequences of ComfyUI's native models, as data: the next model is one row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..attention import VideoLayout

Patch = tuple[int, int, int]


@dataclass(frozen=True)
class Inputs:
    """What one forward pass of a native model is given, as ComfyUI's APPLY_MODEL wrappers see it.

    Args:
        model: the diffusion model.
        latent: shape `[B, C, T, H, W]` of the noisy latent.
        text: tokens of the text condition (`c_crossattn`).
        conditions: the other conditions by name, such as `reference_latent` or `num_tokens`.
    """

    model: Any
    latent: tuple[int, ...]
    text: int
    conditions: Mapping[str, Any]

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


@dataclass(frozen=True)
class Geometry:
    """The self-attention sequence of one class of native models.

    Args:
        family: its name in messages.
        patch: model -> latent frames, rows and columns that make one token.
        blocks: attributes with the transformer blocks, in the order in which they run, each with the value of
            `transformer_options["block_type"]` while it does. Several restart `block_index` at 0.
        extra_blocks: attributes with blocks that run between those under the same `block_index`.
        extra_calls: inputs -> number of a block -> calls that the extra blocks make under its index.
        around: `(inputs, patch) -> (frames, before, after)`: latent frames of the inputs that belong to the video, and
            tokens around it that do not (text, reference frames, context); None where that cannot be told.
        text_apart: whether text has attention calls of its own (cross-attention) instead of a place in the sequence.
    """

    family: str
    patch: Callable[[Any], Patch]
    blocks: tuple[tuple[str, str], ...]
    around: Callable[[Inputs, Patch], tuple[int, int, int] | None]
    extra_blocks: tuple[str, ...] = ()
    extra_calls: Callable[[Inputs], Mapping[int, int]] = lambda inputs: {}
    text_apart: bool = True

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

    def layout(self, inputs: Inputs) -> VideoLayout | None:
        """The sequence of a forward pass; None where it holds no video of a known arrangement."""
        if len(inputs.latent) != 5:
            return None  # an image, or several latents packed into one
        patch = self.patch(inputs.model)
        if len(patch) != 3:
            return None
        found = self.around(inputs, patch)
        if found is None:
            return None
        frames, before, after = found
        if frames < 1:
            return None
        return VideoLayout(
            *grid((*inputs.latent[:2], frames, *inputs.latent[3:]), patch), text_before=before, text_after=after
        )

    def ambiguous(self, inputs: Inputs, layout: VideoLayout) -> bool:
        """Whether a cross-attention call could have the lengths of a self-attention call."""
        image = inputs.conditions.get("clip_fea")
        image = 0 if image is None else image.shape[-2]
        return self.text_apart and layout.tokens in (inputs.text, image, inputs.text + image)


def grid(latent: tuple[int, ...], patch: Patch, padded: bool = True) -> tuple[int, int, int]:
    """Tokens `(frames, rows, columns)` of a latent `[B, C, (T,) H, W]`; what is no multiple of the patch is padded, or
    dropped."""
    sizes = (1, *latent[2:]) if len(latent) == 4 else latent[2:]
    frames, rows, columns = (
        -(-size // step) if padded else size // step for size, step in zip(sizes, patch, strict=True)
    )
    return frames, rows, columns


def _whole_patch(model: Any) -> Patch:
    frames, rows, columns = (int(size) for size in model.patch_size)
    return frames, rows, columns


def _square_patch(model: Any) -> Patch:
    return 1, int(model.patch_size), int(model.patch_size)


def _cosmos_patch(model: Any) -> Patch:
    return int(model.patch_temporal), int(model.patch_spatial), int(model.patch_spatial)


def _alone(inputs: Inputs, patch: Patch) -> tuple[int, int, int]:
    return inputs.latent[2], 0, 0


def _wan(inputs: Inputs, patch: Patch) -> tuple[int, int, int]:
    """A reference image before, reference frames (`time_dim_concat`) and context latents after the video."""
    # The reference goes through a plain convolution, without the padding that the video gets.
    has_reference = getattr(inputs.model, "ref_conv", None) is not None
    before = inputs.tokens("reference_latent", patch, padded=False) if has_reference else 0
    after = inputs.tokens("time_dim_concat", patch) + inputs.tokens("context_latents", patch)
    return inputs.latent[2], before, after


def _vace_calls(inputs: Inputs) -> Mapping[int, int]:
    """One call for each context, in the blocks that have a VACE block beside them."""
    contexts = inputs.conditions.get("vace_context")
    return dict.fromkeys(inputs.model.vace_layers_mapping, 1 if contexts is None else contexts.shape[1])


def _hunyuan(inputs: Inputs, patch: Patch) -> tuple[int, int, int]:
    """Text before the video (behind it until ComfyUI 0.13), a reference image directly before it."""
    text, conditions = inputs.text, inputs.conditions
    if getattr(inputs.model, "byt5_in", None) is not None and conditions.get("txt_byt5") is not None:
        text += conditions["txt_byt5"].shape[1]
    if conditions.get("clip_fea") is not None:
        text += conditions["clip_fea"].shape[1]
    reference = inputs.tokens("ref_latent", patch)
    video_first = getattr(inputs.model.double_blocks[0], "flipped_img_txt", False)
    return (inputs.latent[2], reference, text) if video_first else (inputs.latent[2], text + reference, 0)


def _mochi(inputs: Inputs, patch: Patch) -> tuple[int, int, int]:
    """Behind the video, the part of the text that is not padding."""
    return inputs.latent[2], 0, min(inputs.text, int(inputs.conditions.get("num_tokens", 256)))


def _ltxv(inputs: Inputs, patch: Patch) -> tuple[int, int, int] | None:
    """Guide frames are the last frames of the latent; those of their tokens that the mask drops are not there."""
    frames, height, width = inputs.latent[2:]
    guides = inputs.conditions.get("keyframe_idxs")
    if guides is None or guides.shape[2] == 0:
        return frames, 0, 0
    mask, per_frame = inputs.conditions.get("denoise_mask"), height * width
    if mask is None or guides.shape[2] % per_frame or guides.shape[2] >= frames * per_frame:
        return None
    kept = (mask[0] >= 0).all(dim=0).expand(frames, height, width).flatten()
    video = frames - guides.shape[2] // per_frame
    if not bool(kept[: video * per_frame].all()):
        return None
    return video, 0, int(torch.count_nonzero(kept[video * per_frame :]))


_WAN_BLOCKS = (("blocks", "double"),)

# By the class of `model.diffusion_model`, by its name alone: a subclass is another model. Wan's audio, pose and
# animation models, for example, add tokens of their own.
GEOMETRIES: dict[str, Geometry] = {
    "WanModel": Geometry("Wan", _whole_patch, _WAN_BLOCKS, _wan),
    "VaceWanModel": Geometry(
        "Wan VACE", _whole_patch, _WAN_BLOCKS, _wan, extra_blocks=("vace_blocks",), extra_calls=_vace_calls
    ),
    "CameraWanModel": Geometry("Wan Camera", _whole_patch, _WAN_BLOCKS, _wan),
    "HunyuanVideo": Geometry(
        "HunyuanVideo",
        _whole_patch,
        (("double_blocks", "double"), ("single_blocks", "single")),
        _hunyuan,
        text_apart=False,
    ),
    "AsymmDiTJoint": Geometry("Mochi", _square_patch, (("blocks", ""),), _mochi, text_apart=False),
    "LTXVModel": Geometry("LTX-Video", lambda model: (1, 1, 1), (("transformer_blocks", ""),), _ltxv),
    "MiniTrainDIT": Geometry("Cosmos-Predict2", _cosmos_patch, (("blocks", ""),), _alone),
}


def supported_models() -> str:
    """The families, for messages."""
    return ", ".join(geometry.family for geometry in GEOMETRIES.values())


def find_geometry(model: Any) -> Geometry | None:
    """The geometry of a diffusion model (also of one that torch.compile wrapped); None where it is not known."""
    return GEOMETRIES.get(type(unwrap(model)).__name__)


def unwrap(model: Any) -> Any:
    """The module that `torch.compile` wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)
