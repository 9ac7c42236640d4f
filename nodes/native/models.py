"""The native video models of ComfyUI that can be sparse, a row each, and those that cannot, with the reason."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from .geometry import Geometry, Inputs, Patch, StaysDense, grid, nothing_else, text_and_pictures, unwrap

Around = tuple[int, int, int]  # frames of the video, tokens before it, tokens after it


# -- how many frames, rows and columns of the latent make a token ------------------------------------------------------


def _whole_patch(model: Any) -> Patch:
    frames, rows, columns = (int(size) for size in model.patch_size)
    return frames, rows, columns


def _square_patch(model: Any) -> Patch:
    return int(getattr(model, "patch_size_t", None) or 1), int(model.patch_size), int(model.patch_size)


def _cosmos_patch(model: Any) -> Patch:
    return int(model.patch_temporal), int(model.patch_spatial), int(model.patch_spatial)


def _no_patch(model: Any) -> Patch:
    return 1, 1, 1


# -- attention heads over the video, and channels of each, where they are not `num_heads` and `dim` --------------------


def _heads_of_hidden(model: Any) -> tuple[int, int]:
    return model.num_heads, model.hidden_size // model.num_heads


def _heads_of_mochi(model: Any) -> tuple[int, int]:
    return model.num_heads, model.head_dim


def _heads_of_channels(model: Any) -> tuple[int, int]:
    return model.num_heads, model.model_channels // model.num_heads


def _heads_as_in_diffusers(model: Any) -> tuple[int, int]:
    return model.num_attention_heads, model.attention_head_dim


def _heads_of_kandinsky(model: Any) -> tuple[int, int]:
    attention = model.visual_transformer_blocks[0].self_attention
    return attention.num_heads, model.model_dim // attention.num_heads


def _heads_of_minimax(model: Any) -> tuple[int, int]:
    return model.blocks[0].attn.heads, model.blocks[0].attn.head_dim


# -- what is around the video ------------------------------------------------------------------------------------------


def _alone(inputs: Inputs, patch: Patch) -> Around:
    return inputs.latent[2], 0, 0


def _text_first(inputs: Inputs, patch: Patch) -> Around:
    return inputs.latent[2], inputs.text, 0


def _wan(inputs: Inputs, patch: Patch) -> Around:
    """A reference image before the video, reference frames (`time_dim_concat`) after it."""
    # The reference goes through a plain convolution, without the padding that the video gets.
    has_reference = getattr(inputs.model, "ref_conv", None) is not None
    before = inputs.tokens("reference_latent", patch, padded=False) if has_reference else 0
    return inputs.latent[2], before, inputs.tokens("time_dim_concat", patch)


def _wan_in_context(inputs: Inputs, patch: Patch) -> Around:
    """And context latents after these."""
    frames, before, after = _wan(inputs, patch)
    return frames, before, after + inputs.tokens("context_latents", patch)


def _wan_humo(inputs: Inputs, patch: Patch) -> Around:
    """Reference latents after the video, cut to whole patches."""
    after = inputs.tokens("time_dim_concat", patch) + inputs.tokens("reference_latent", patch, padded=False)
    return inputs.latent[2], 0, after


def _wan_s2v(inputs: Inputs, patch: Patch) -> Around:
    """And then the frames that came before this video: the older they are, the larger their patches."""
    frames, before, after = _wan_humo(inputs, patch)
    motion = inputs.conditions.get("reference_motion")
    if motion is not None:
        for scale, bucket in zip((1, 2, 4), inputs.model.frame_packer.zip_frame_buckets, strict=True):
            after += math.prod(grid((1, 1, bucket, *motion.shape[-2:]), (scale, 2 * scale, 2 * scale), padded=False))
    return frames, before, after


def _wan_scail(inputs: Inputs, patch: Patch) -> Around:
    """Reference frames before the video, a pose video, often at half its size, after it."""
    after = inputs.tokens("time_dim_concat", patch) + inputs.tokens("pose_latents", patch)
    return inputs.latent[2], inputs.tokens("reference_latent", patch), after


def _vace_calls(inputs: Inputs) -> Mapping[int, int]:
    """One call for each context, in the blocks that have a VACE block beside them."""
    contexts = inputs.conditions.get("vace_context")
    return dict.fromkeys(inputs.model.vace_layers_mapping, 1 if contexts is None else contexts.shape[1])


def _hunyuan(inputs: Inputs, patch: Patch) -> Around:
    """Text before the video (behind it until ComfyUI 0.13), a reference image directly before it."""
    text = inputs.text + inputs.rows("clip_fea")
    if getattr(inputs.model, "byt5_in", None) is not None:
        text += inputs.rows("txt_byt5")
    reference = inputs.tokens("ref_latent", patch)
    video_first = getattr(inputs.model.double_blocks[0], "flipped_img_txt", False)
    return (inputs.latent[2], reference, text) if video_first else (inputs.latent[2], text + reference, 0)


def _mochi(inputs: Inputs, patch: Patch) -> Around:
    """Behind the video, the part of the text that is not padding."""
    return inputs.latent[2], 0, min(inputs.text, int(inputs.conditions.get("num_tokens", 256)))


def _ltx(inputs: Inputs, patch: Patch) -> Around:
    """Guide frames are the last frames of the latent; those of their tokens that the mask drops are not there."""
    frames, height, width = inputs.latent[2:]
    guides = inputs.conditions.get("keyframe_idxs")
    if guides is None or guides.shape[2] == 0:
        return frames, 0, 0
    entries = inputs.conditions.get("guide_attention_entries") or ()
    if any(entry["strength"] != 1.0 or entry.get("pixel_mask") is not None for entry in entries):
        raise StaysDense("a guide with a strength other than 1 or a mask weights the attention of every layer")
    mask, per_frame = inputs.conditions.get("denoise_mask"), height * width
    if mask is None or guides.shape[2] % per_frame or guides.shape[2] >= frames * per_frame:
        raise StaysDense("guides without a mask, or made for another resolution, have no known place in the sequence")
    kept = (mask[0] >= 0).all(dim=0).expand(frames, height, width).flatten()
    video = frames - guides.shape[2] // per_frame
    if not bool(kept[: video * per_frame].all()):
        raise StaysDense("the mask drops tokens of the video itself, so it is no grid of tokens any more")
    return video, 0, int(torch.count_nonzero(kept[video * per_frame :]))


def _text_and_audio(inputs: Inputs) -> Collection[int]:
    """Of LTX-2: an audio token is a frame of its latent `[B, C, T, F]`; a reference is put before them."""
    reference = (inputs.conditions.get("ref_audio") or {}).get("tokens")
    audio = sum(inputs.audio[2:3]) + (0 if reference is None else reference.shape[1])
    return *text_and_pictures(inputs), audio


def _no_self_attention(options: Mapping[str, Any]) -> Collection[int]:
    """Of LTX-2 in the additional pass of spatio-temporal guidance: blocks that take the values as they are."""
    return options.get("stg_self_attn_blocks", ())


def _minimax(inputs: Inputs, patch: Patch) -> Around:
    """Text, references and two channels of audio `[B, C, 2, T]` before the video. The model's own table, which is made
    once a sampling, has the references; text and audio may be those of a context window."""
    table = (inputs.conditions.get("minimax_payload") or {}).get("layout")
    segments = () if table is None else table.segments
    references = sum(stop - start for start, stop, kind in segments if kind not in ("text", "audio", "video"))
    return inputs.latent[2], inputs.text + references + math.prod(inputs.audio[2:4]), 0


# -- the rows ----------------------------------------------------------------------------------------------------------

_BLOCKS = (("blocks", "double"),)

# Families of pipelines whose presets several classes take.
WAN = "Wan 2.1 / 2.2"
COSMOS = "Cosmos 1 / Predict2 / 2.5"

# By the class of `model.diffusion_model`, by its name alone: a subclass is another model.
GEOMETRIES: dict[str, Geometry] = {
    "WanModel": Geometry(
        "Wan",
        "Wan 2.1 and 2.2, text and image to video, Fun Control, and what has their weights",
        "reference image, **video**, reference frames, context latents",
        _whole_patch,
        _BLOCKS,
        _wan_in_context,
        presets=(WAN,),
    ),
    "VaceWanModel": Geometry(
        "Wan VACE",
        "Wan 2.1 and 2.2 VACE",
        "**video**; the VACE blocks likewise",
        _whole_patch,
        _BLOCKS,
        _wan_in_context,
        extra_blocks=("vace_blocks",),
        extra_calls=_vace_calls,
        presets=("Wan VACE", WAN),
    ),
    "CameraWanModel": Geometry(
        "Wan Camera",
        "Wan 2.1 and 2.2 Fun Camera",
        "**video**",
        _whole_patch,
        _BLOCKS,
        _wan_in_context,
        presets=(WAN,),
    ),
    "AnimateWanModel": Geometry(
        "Wan Animate",
        "Wan 2.2 Animate",
        "**video**, its first frame the character; faces and pose are no tokens",
        _whole_patch,
        _BLOCKS,
        _wan,
        presets=("Wan Animate",),
    ),
    "WanModel_S2V": Geometry(
        "Wan S2V",
        "Wan 2.2 S2V, speech to video",
        "**video**, reference image, frames before the video",
        _whole_patch,
        _BLOCKS,
        _wan_s2v,
        presets=(WAN,),
    ),
    "HumoWanModel": Geometry(
        "HuMo", "HuMo 1.7B and 17B", "**video**, reference image", _whole_patch, _BLOCKS, _wan_humo
    ),
    "SCAILWanModel": Geometry(
        "SCAIL", "SCAIL-Preview", "reference image, **video**, pose video", _whole_patch, _BLOCKS, _wan_scail
    ),
    "SCAIL2WanModel": Geometry(
        "SCAIL-2", "SCAIL-2", "reference images, **video**, pose video", _whole_patch, _BLOCKS, _wan_scail
    ),
    "WanDancerModel": Geometry(
        "WanDancer", "Wan Dancer", "reference image, **video**, reference frames", _whole_patch, _BLOCKS, _wan
    ),
    "HunyuanVideo": Geometry(
        "HunyuanVideo",
        "HunyuanVideo, its image to video, SkyReels V1, HunyuanVideo 1.5 and its upscaler",
        "text, reference image, **video**",
        _whole_patch,
        (("double_blocks", "double"), ("single_blocks", "single")),
        _hunyuan,
        elsewhere=nothing_else,
        heads=_heads_of_hidden,
        presets=("HunyuanVideo", "HunyuanVideo 1.5"),
        patches_output=True,
    ),
    "AsymmDiTJoint": Geometry(
        "Mochi",
        "Mochi 1",
        "**video**, text",
        _square_patch,
        _BLOCKS,
        _mochi,
        elsewhere=nothing_else,
        heads=_heads_of_mochi,
        presets=("Mochi 1",),
    ),
    "LTXVModel": Geometry(
        "LTX-Video",
        "LTX-Video 0.9",
        "**video**, guides",
        _no_patch,
        (("transformer_blocks", "double"),),
        _ltx,
        heads=_heads_as_in_diffusers,
        presets=("LTX-Video",),
    ),
    "LTXAVModel": Geometry(
        "LTX-2",
        "LTX-2 and later, with and without audio",
        "**video**, guides; audio has attention of its own",
        _no_patch,
        (("transformer_blocks", "double"),),
        _ltx,
        elsewhere=_text_and_audio,
        silent=_no_self_attention,
        heads=_heads_as_in_diffusers,
        presets=("LTX-2",),
    ),
    "GeneralDIT": Geometry(
        "Cosmos 1",
        "Cosmos 1 text and video to world",
        "**video**",
        _cosmos_patch,
        _BLOCKS,
        _alone,
        heads=_heads_of_channels,
        presets=(COSMOS,),
    ),
    "MiniTrainDIT": Geometry(
        "Cosmos-Predict2",
        "Cosmos-Predict2 video to world",
        "**video**",
        _cosmos_patch,
        _BLOCKS,
        _alone,
        heads=_heads_of_channels,
        presets=(COSMOS,),
    ),
    "Kandinsky5": Geometry(
        "Kandinsky 5",
        "Kandinsky 5 text and image to video",
        "**video**",
        _whole_patch,
        (("visual_transformer_blocks", "double"),),
        _alone,
        heads=_heads_of_kandinsky,
        presets=("Kandinsky 5",),
    ),
    "CogVideoXTransformer3DModel": Geometry(
        "CogVideoX",
        "CogVideoX and 1.5, text and image to video, inpainting",
        "text, **video**",
        _square_patch,
        _BLOCKS,
        _text_first,
        elsewhere=nothing_else,
        heads=_heads_as_in_diffusers,
        presets=("CogVideoX",),
    ),
    "MiniMaxH3Model": Geometry(
        "MiniMax H3",
        "MiniMax H3, text, first frame and references to video",
        "text, references, audio, **video**",
        _whole_patch,
        _BLOCKS,
        _minimax,
        elsewhere=nothing_else,
        heads=_heads_of_minimax,
        presets=("MiniMax-H3",),
    ),
}

# Video models whose attention is no attention of a whole video to itself, with why.
DENSE: dict[str, str] = {
    "CausalWanModel": "it makes one group of frames after another and keeps the keys of earlier ones, so no call has "
    "the whole video",
    "WanAnimate2Model": "each of its frames reads the whole video and a pose frame of its own, in a call of its own",
    "NaDiT": "it upscales a video in windows, and each call has the tokens of one window",
}


def supported_models() -> str:
    """The families, for messages."""
    return ", ".join(geometry.family for geometry in GEOMETRIES.values())


def find_geometry(model: Any) -> Geometry | None:
    """The geometry of a diffusion model (also of one that torch.compile wrapped); None where it is not known."""
    return GEOMETRIES.get(type(unwrap(model)).__name__)


def why_dense(model: Any) -> str:
    """Why a diffusion model without a geometry stays dense, as a note."""
    name = type(unwrap(model)).__name__
    if name in DENSE:
        return f"{name} stays dense: {DENSE[name]}."
    return f"{name} is no model that sparse attention knows, so it stays dense. Known: {supported_models()}."
