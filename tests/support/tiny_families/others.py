"""LTX, Kandinsky, Allegro, MiniMax and what is not served."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

from vidaccel import VideoLayout

from .base import GRID, Tiny, noise

LTX = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
       "cross_attention_dim": 32, "caption_channels": 16}  # fmt: skip
LTX2 = {**LTX, "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "rope_double_precision": False}  # fmt: skip
SIZE = {"num_frames": 3, "height": 4, "width": 6}
KANDINSKY = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16,
             "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "axes_dims": (4, 6, 6)}  # fmt: skip


def ltx_given(tokens: int = 72, **more) -> dict:
    return {"hidden_states": noise(1, tokens, 8), "encoder_hidden_states": noise(1, 7, 16),
            "timestep": torch.tensor([500]), "encoder_attention_mask": torch.ones(1, 7), **more}  # fmt: skip


def ltx(layers: int) -> Tiny:
    model = diffusers.LTXVideoTransformer3DModel(**LTX, num_layers=layers)
    return Tiny(model, ltx_given(**SIZE), VideoLayout(*GRID), layers, axes=None)


def ltx_condition(layers: int, behind: bool = False) -> Tiny:
    """Coordinates in pixels instead of a size, and a conditioning frame in front of the video or behind it."""
    axes = torch.meshgrid(*(torch.arange(size) for size in GRID), indexing="ij")
    video = torch.stack([axis.flatten() * step for axis, step in zip(axes, (8, 32, 32), strict=True)])[None].float()
    frame = video[:, :, :24] + torch.tensor([16.0 if behind else 24.0, 0, 0])[None, :, None]
    places = torch.cat([video, frame] if behind else [frame, video], 2)
    model = diffusers.LTXVideoTransformer3DModel(**LTX, num_layers=layers)
    more = ltx_given(96, timestep=torch.full((1, 96), 500.0), video_coords=places)
    layout = VideoLayout(*GRID, **{"text_after" if behind else "text_before": 24})
    return Tiny(model, more, layout, layers, axes=None, first=0 if behind else 24)


def ltx_condition_behind(layers: int) -> Tiny:
    return ltx_condition(layers, behind=True)


def ltx2(layers: int, **config) -> Tiny:
    model = diffusers.LTX2VideoTransformer3DModel(**LTX2, **config, num_layers=layers)
    more = {"audio_hidden_states": noise(1, 10, 8), "audio_encoder_hidden_states": noise(1, 7, 16)}
    more |= {"timestep": torch.tensor([500.0]), "sigma": torch.tensor([500.0]), "audio_num_frames": 10}
    more |= {"audio_encoder_attention_mask": torch.ones(1, 7)}
    return Tiny(model, ltx_given(**SIZE, **more), VideoLayout(*GRID), layers, axes=None)


def ltx2_3(layers: int) -> Tiny:
    """Gates per head, halves of channels that rotate, a processor that can leave attention out."""
    config = {"gated_attn": True, "audio_gated_attn": True, "perturbed_attn": True, "rope_type": "split"}
    return ltx2(layers, **config)


def ltx2_3_guided(layers: int) -> Tiny:
    """A pass of spatio-temporal guidance: the last layer makes no attention call."""
    tiny = ltx2_3(layers)
    tiny.given["spatio_temporal_guidance_blocks"] = [layers - 1]
    tiny.layers = layers - 1
    return tiny


def ltx2_masked(layers: int) -> Tiny:
    """A mask of all pairs, as IC-LoRAs have it: all calls stay dense."""
    tiny = ltx2(layers)
    tiny.given["video_self_attention_mask"] = mask = torch.ones(1, 72, 72)
    mask[:, :24, 48:] = 0
    tiny.layers = 0
    return tiny


def kandinsky5(layers: int) -> Tiny:
    model = diffusers.Kandinsky5Transformer3DModel(**KANDINSKY, num_visual_blocks=layers)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # its modulation starts at zero: then attention would not matter
    more = {"hidden_states": noise(1, 3, 8, 12, 4), "encoder_hidden_states": noise(1, 7, 16)}
    more |= {"timestep": torch.tensor([500.0]), "pooled_projections": noise(1, 8)}
    more |= {"visual_rope_pos": [torch.arange(size) for size in GRID], "text_rope_pos": torch.arange(7)}
    return Tiny(model, more, VideoLayout(*GRID), layers, axes=(1, 2, 3))


def kandinsky6(layers: int) -> Tiny:
    config = {"visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4, "num_visual_blocks": layers}
    model = diffusers.Kandinsky6Transformer3DModel(**KANDINSKY, **config)
    more = {"hidden_states": noise(1, 3, 8, 12, 4), "encoder_hidden_states": noise(1, 7, 16)}
    more |= {"timestep": torch.tensor([500.0]), "pooled_projections": noise(1, 8)}
    more |= {"audio_hidden_states": noise(1, 10, 4)}
    return Tiny(model, more, VideoLayout(*GRID), layers, axes=(1, 2, 3))


def allegro(layers: int) -> Tiny:
    """Heads of 12 channels: no power of two."""
    model = diffusers.AllegroTransformer3DModel(
        patch_size=2, patch_size_t=1, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        num_layers=layers, cross_attention_dim=24, sample_height=8, sample_width=12, sample_frames=3,
        caption_channels=16,
    )  # fmt: skip
    *freqs, t, h, w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), GRID[1:]), grid_size=GRID[1:], temporal_size=3)
    places = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    more = {"hidden_states": noise(1, 4, 3, 8, 12), "encoder_hidden_states": noise(1, 7, 16)}
    more |= {"timestep": torch.tensor([500]), "encoder_attention_mask": torch.ones(1, 7)}
    more |= {"image_rotary_emb": (tuple(freqs), tuple(places))}
    return Tiny(model, more, VideoLayout(*GRID), layers)


MINIMAX = {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_refiner_layers": 1,
           "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 4, "text_dim": 16, "freq_dim": 16,
           "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2}  # fmt: skip


def minimax_h3(layers: int) -> Tiny:
    """Text, video and sound in one packed sequence."""
    model = diffusers.MiniMaxH3Transformer3DModel(**MINIMAX, num_layers=layers)
    text, video, sound = 5, 72, 6
    total = text + video + sound
    places = torch.zeros(total, 3, dtype=torch.long)
    places[:text] = torch.arange(text)[:, None]
    places[text : text + video] = torch.cartesian_prod(*(torch.arange(size) for size in GRID)) + 5
    places[text + video :] = torch.arange(sound)[:, None] + 5
    tags = torch.cat([torch.ones(text), torch.zeros(video), torch.full((sound,), 2)]).long()
    more = {"hidden_states": noise(1, video, 16), "audio_hidden_states": noise(1, sound, 4),
            "encoder_hidden_states": noise(1, text, 16), "timestep": torch.tensor([0.0, 0.5]),
            "timestep_indices": (tags != 1).long(), "token_tags": tags, "position_ids": places,
            "text_indices": torch.arange(text), "video_indices": torch.arange(text, text + video),
            "audio_indices": torch.arange(text + video, total)}  # fmt: skip
    return Tiny(model, more, VideoLayout(*GRID, text_before=text, text_after=sound), layers, axes=None)


def minimax_h3_keyframes(layers: int) -> Tiny:
    return minimax_h3_packed(layers, ("first", "last"))


def minimax_h3_packed(layers: int, keyframes: tuple[str, ...]) -> Tiny:
    """In diffusers' own order: text, keyframes, sound in two channels, video."""
    packing = MiniMaxH3PrepareLayoutStep.build_packed_sequence
    frames, height, width = GRID[0], 2 * GRID[1], 2 * GRID[2]
    tags = torch.ones(5, dtype=torch.long)
    packed = packing(tags, frames, height, width, 3, (1, 2, 2), 2, 2, 0, keyframe_anchors=keyframes)
    return minimax_h3_at(layers, packed)


def minimax_h3_at(layers: int, packed: tuple) -> Tiny:
    """What diffusers' blocks give a transformer whose rows they packed, with the video last."""
    places, tags, video, sound, text, conditions, _ = packed
    model = diffusers.MiniMaxH3Transformer3DModel(**MINIMAX, num_layers=layers)
    given = {"hidden_states": noise(1, len(video), 16), "audio_hidden_states": noise(1, len(sound), 4),
             "encoder_hidden_states": noise(1, len(text), 16), "timestep": torch.tensor([0.0, 0.5]),
             "timestep_indices": (tags != 1).long(), "token_tags": tags, "position_ids": places,
             "text_indices": text, "video_indices": video, "audio_indices": sound}  # fmt: skip
    layout = VideoLayout(*GRID, text_before=len(tags) - 72)
    return Tiny(model, given, layout, layers, axes=None, first=conditions)


BUILDERS = {f.__name__: f for f in (ltx, ltx_condition, ltx_condition_behind, ltx2, ltx2_3, ltx2_3_guided, ltx2_masked,
                                    kandinsky5, kandinsky6, allegro, minimax_h3, minimax_h3_keyframes)}  # fmt: skip
