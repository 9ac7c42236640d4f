"""Where the video tokens of a family's attention sequence are, read from what its transformer is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from ...attention import VideoLayout
from .host_reads import read_once

Given = Mapping[str, Any]
"""The arguments of a transformer's forward pass, by name."""
Layouts = tuple[VideoLayout, ...] | str
"""One layout for the batch, or one for each sample; or why there is none, as the reason of dense calls."""

HOLES = "text mask with holes"  # valid tokens that are no prefix cannot be cut out without moving others


def patch_of(model: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns that make one token."""
    patch = model.config.patch_size
    if not isinstance(patch, int):
        return tuple(patch)
    return getattr(model.config, "patch_size_t", None) or 1, patch, patch


def grid(model: Any, latents: torch.Tensor, axes: tuple[int, int, int] = (2, 3, 4)) -> tuple[int, int, int]:
    """Latents cut into patches; `axes` are those of frames, height and width."""
    if latents.ndim != 5:
        raise ValueError(
            f"latents of a {type(model).__name__} have 5 axes, batch, channels, frames, height and width; these have "
            f"{latents.ndim}, of shape {tuple(latents.shape)}: give a batch of videos, also where it is one video."
        )
    frames, height, width = (latents.shape[axis] // patch for axis, patch in zip(axes, patch_of(model), strict=True))
    return frames, height, width


def video_alone(model: Any, given: Given) -> Layouts:
    """Latents `[B, C, F, H, W]` and nothing beside the video."""
    return (VideoLayout(*grid(model, given["hidden_states"])),)


def frames_before_channels(model: Any, given: Given) -> Layouts:
    """Latents `[B, F, C, H, W]` and nothing beside the video."""
    return (VideoLayout(*grid(model, given["hidden_states"], (1, 3, 4))),)


def kandinsky(model: Any, given: Given) -> Layouts:
    """Latents `[B, F, H, W, C]`; NABLA models put the tokens into tiles and have a sparse mask of their own."""
    if given.get("sparse_params") is not None:
        return "NABLA, which is sparse already"
    return (VideoLayout(*grid(model, given["hidden_states"], (1, 2, 3))),)


def text_after(model: Any, given: Given) -> Layouts:
    """`[video, text]`, the text padded behind what `encoder_attention_mask [B, L]` says is valid (HunyuanVideo)."""
    return with_texts(VideoLayout(*grid(model, given["hidden_states"])), given.get("encoder_attention_mask"))


def motif(model: Any, given: Given) -> Layouts:
    """`[video, picture, text]`, the text padded; without a mask all of it is valid."""
    video = VideoLayout(*grid(model, given["hidden_states"]), text_after=_length(given.get("image_embeds")))
    if given.get("encoder_attention_mask") is None:
        return (replace(video, text_after=video.text_after + _length(given["encoder_hidden_states"])),)
    return with_texts(video, given["encoder_attention_mask"])


def mochi(model: Any, given: Given) -> Layouts:
    """`[video, valid text]`, for each sample alone; its processor takes valid tokens from wherever they are.

    One for each sample, alike or not: each has calls of its own, which must not pass for one another's.
    """
    counts = _valid(given["encoder_attention_mask"])
    video = VideoLayout(*grid(model, given["hidden_states"]))
    return tuple(replace(video, text_after=int(count)) for count in counts)


@read_once
def _valid(mask: torch.Tensor) -> list[float]:
    """The valid tokens of each sample."""
    return mask.sum(-1).tolist()


def hunyuan_15(model: Any, given: Given) -> Layouts:
    """`[video, valid picture, byT5 text, other text, padding]`: the model sorts valid tokens to the front."""
    picture = given["image_embeds"]
    *counts, empty = _valid_and_empty(given["encoder_attention_mask"], given["encoder_attention_mask_2"], picture)
    video = VideoLayout(*grid(model, given["hidden_states"]), text_after=0 if empty else picture.shape[1])
    return same(replace(video, text_after=video.text_after + count) for count in counts)


@read_once
def _valid_and_empty(mask: torch.Tensor, mask_2: torch.Tensor, picture: torch.Tensor) -> list[int]:
    """The valid tokens of each sample, and whether there is no picture, for which zeros stand."""
    counts = mask.bool().sum(-1) + mask_2.bool().sum(-1)
    return torch.cat([counts, (picture == 0).all().to(counts)[None]]).tolist()


def framepack(model: Any, given: Given) -> Layouts:
    """`[history, oldest first, video, picture, text]`."""
    clean, half, quarter = (given.get(f"latents_{name}") for name in ("clean", "history_2x", "history_4x"))
    before = _patches(clean, (1, 2, 2)) + _patches(half, (2, 4, 4)) + _patches(quarter, (4, 8, 8))
    size = grid(model, given["hidden_states"])
    after = _length(given["image_embeds"])
    video = VideoLayout(*size, text_before=before, text_after=after, beside="history with picture and text")
    return with_texts(video, given["encoder_attention_mask"])


def helios(model: Any, given: Given) -> Layouts:
    """`[history, oldest first, video]`."""
    short, mid, long = (given.get(f"latents_history_{name}") for name in ("short", "mid", "long"))
    before = _patches(short, (1, 2, 2)) + _patches(mid, (2, 4, 4)) + _patches(long, (4, 8, 8))
    return (VideoLayout(*grid(model, given["hidden_states"]), text_before=before, beside="history"),)


def cogvideox(model: Any, given: Given) -> Layouts:
    """`[text, video]`, latents `[B, F, C, H, W]`."""
    video = grid(model, given["hidden_states"], (1, 3, 4))
    return (VideoLayout(*video, text_before=_length(given["encoder_hidden_states"])),)


def easyanimate(model: Any, given: Given) -> Layouts:
    """`[text, second text, video]`, latents `[B, C, F, H, W]`."""
    text = _length(given["encoder_hidden_states"]) + _length(given.get("encoder_hidden_states_t5"))
    return (VideoLayout(*grid(model, given["hidden_states"]), text_before=text),)


def packed(model: Any, given: Given) -> Layouts:
    """Latents `[B, N, C]` (LTX): sizes are arguments, or only coordinates are, with conditioning tokens in front."""
    tokens, frames = given["hidden_states"].shape[1], given.get("num_frames")
    size = (frames, given.get("height"), given.get("width"))
    coordinates = given.get("video_coords")
    if frames is not None and size[0] * size[1] * size[2] == tokens:
        return (VideoLayout(*size),)
    if coordinates is None:
        return f"{tokens} tokens that are no grid of {size[0]} x {size[1]} x {size[2]}"
    return _by_coordinates(coordinates)


@read_once
def _by_coordinates(coordinates: torch.Tensor) -> Layouts:
    """The grid of tokens at places `[B, 3, N]`, alike in all samples: the longest run in which they go up in time,
    height and width.

    With `[B, 3, N, 2]`, where tokens begin and end (LTX-2), a frame of the run begins where the one before ends, too.
    Conditioning frames before or behind the video start again at the first row, at a time of their own.
    """
    places = coordinates[0].cpu()
    tokens = places.shape[1]
    time, row, column = places if places.ndim == 2 else places[..., 0]
    here, there = (slice(None, -1), slice(1, None))
    falls = _falls(time, row, column)
    if places.ndim == 3:
        falls |= (time[there] > time[here]) & (time[there] != places[0, here, 1])
    ends = [0, *(falls.nonzero().flatten() + 1).tolist(), tokens]
    first, stop = max(pairwise(ends), key=lambda run: run[1] - run[0])
    frames, height, width = (len(axis[first:stop].unique()) for axis in (time, row, column))
    if frames * height * width != stop - first:
        return "conditioning tokens that cannot be told from the video's"
    return (VideoLayout(frames, height, width, text_before=first, text_after=tokens - stop, beside="conditioning"),)


def _falls(time: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Whether each token but the first does not come after the one before it, frame by frame and row by row: `[N - 1]`
    bool from places `[N]`."""
    here, there = (slice(None, -1), slice(1, None))
    falls = (row[there] < row[here]) | ((row[there] == row[here]) & (column[there] <= column[here]))
    return (time[there] < time[here]) | ((time[there] == time[here]) & falls)


def cosmos_3(model: Any, given: Given) -> Layouts:
    """`[understanding, generation]` as keys, generation alone as queries."""
    shapes, text = given["vision_token_shapes"], given["und_len"]
    if len(shapes) != 1:
        return f"{len(shapes)} videos in one sequence"
    frames, height, width = (int(size) for size in shapes[0])
    video = VideoLayout(frames, height, width, text_before=int(text))
    # Sound and action tokens follow the video's.
    return (replace(video, text_after=int(given["sequence_length"]) - video.tokens),)


def minimax(model: Any, given: Given) -> Layouts:
    """Text, video and sound packed into one sequence at whatever places `*_indices` say.

    `video_indices` has what conditions the video first: pictures, which sound may part from the video, and reference
    videos. So the video is the last grid of the last of these rows without a gap.
    """
    return _last_grid(given["video_indices"], given["position_ids"], given["token_tags"])


@read_once
def _last_grid(indices: torch.Tensor, positions: torch.Tensor, tags: torch.Tensor) -> Layouts:
    """The last grid of the last rows without a gap."""
    *places, rows = torch.cat([positions[indices].T, indices[None]]).cpu()
    gaps = (rows.diff() != 1).nonzero().flatten() + 1
    piece = int(gaps[-1]) if len(gaps) else 0
    time, row, column = (axis[piece:] for axis in places)
    falls = _falls(time, row, column).nonzero().flatten() + 1
    first = int(falls[-1]) if len(falls) else 0
    frames, height, width = (len(axis[first:].unique()) for axis in (time, row, column))
    if frames * height * width != len(time) - first:
        return "video tokens that are no grid in one piece"
    before, total = int(rows[piece + first]), len(tags)
    after = total - 1 - int(rows[-1])
    beside = "text with pictures and sound" if piece or first else "text with sound"
    return (VideoLayout(frames, height, width, text_before=before, text_after=after, beside=beside),)


@read_once
def _valid_and_holes(mask: torch.Tensor) -> list[int]:
    """The valid tokens of each sample of `[B, L]`, and how many valid tokens stand behind invalid ones."""
    mask = mask.bool()
    rises = (mask[:, 1:] & ~mask[:, :-1]).sum(-1)
    return torch.cat([mask.sum(-1), rises.sum()[None]]).tolist()


def with_texts(video: VideoLayout, mask: torch.Tensor) -> Layouts:
    """A layout with the valid tokens of a padding mask `[B, L]` behind what is there."""
    *counts, holes = _valid_and_holes(mask)
    if holes:
        return HOLES
    return same(replace(video, text_after=video.text_after + count) for count in counts)


def same(layouts: Any) -> Layouts:
    """One layout for all samples where all are alike."""
    layouts = tuple(layouts)
    return layouts[:1] if len(set(layouts)) == 1 else layouts


def _length(embeddings: torch.Tensor | None) -> int:
    return 0 if embeddings is None else embeddings.shape[1]


def _patches(latents: torch.Tensor | None, patch: tuple[int, int, int]) -> int:
    """Tokens of latents `[B, C, F, H, W]` in patches that the last of each axis is padded to."""
    if latents is None:
        return 0
    count = 1
    for size, step in zip(latents.shape[2:], patch, strict=True):
        count *= -(-size // step)
    return count
