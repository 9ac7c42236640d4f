"""Which shape, colour and motion a video shows, measured from its pixels alone.

The checker knows what the world can contain, but not what the video was asked to show. It separates one object from a
plain background, compares its outline with the ideal shapes of the same area and centre, takes the nearest hue, and
follows the centre. Whatever is not clear is reported as "none", so noise, blank videos and shuffled frames pass for
nothing.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from . import world

if TYPE_CHECKING:
    import numpy as np
    import torch

NONE = "none"
ATTRIBUTES = ("shape", "colour", "motion", "background")

_MIN_CONTRAST = 0.2  # distance of object and background in RGB
_PLAIN_BORDER = 0.7  # share of border pixels that must look like the background
_AREA = (0.02, 0.4)  # of the frame
_PRESENT = 0.8  # share of frames that must show the object
_MIN_OVERLAP = 0.8  # intersection over union with the ideal shape
_MIN_SATURATION = 0.3
_MAX_HUE_ERROR = 30.0  # degrees
_MIN_TRAVEL = 0.12  # of the frame, first to last quarter of the clip
_MIN_TREND = 0.9  # correlation of position and time


@dataclass(frozen=True)
class Reading:
    """What a video shows; each field is a name of the world, or "none" where nothing clear was found."""

    shape: str
    colour: str
    motion: str
    background: str

    def agrees_with(self, prompt: str) -> dict[str, bool]:
        """For each attribute, whether the prompt asks for it; "all" is shape, colour and motion together.

        Raises:
            ValueError: when `prompt` is not a caption of the world.
        """
        wanted = dict(zip(ATTRIBUTES, world.parse_caption(prompt), strict=True))
        result = {name: value == wanted[name] for name, value in asdict(self).items()}
        return result | {"all": result["shape"] and result["colour"] and result["motion"]}


def check(video: torch.Tensor | np.ndarray) -> Reading:
    """Read a video.

    Args:
        video: `[F, 3, H, W]` or `[F, H, W, 3]`, floats in [0, 1] or bytes; on any device, and read on the CPU.

    Raises:
        ValueError: for another shape.
    """
    import torch

    video = torch.as_tensor(video).cpu()
    if video.ndim != 4 or 3 not in (video.shape[1], video.shape[-1]):
        raise ValueError(f"the video has shape {tuple(video.shape)}, but must be [F, 3, H, W] or [F, H, W, 3]")
    if video.shape[1] != 3:
        video = video.permute(0, 3, 1, 2)
    video = video.float() / 255 if video.dtype == torch.uint8 else video.float()
    video = video.nan_to_num(0.0)

    nothing = Reading(NONE, NONE, NONE, NONE)
    background = _plain_border(video)
    if background is None:
        return nothing
    background_name = _nearest_background(background)
    mask, colour = _object_mask(video, background)
    if mask is None:
        return Reading(NONE, NONE, NONE, background_name)
    area = mask.mean(dim=(1, 2))
    present = (area > _AREA[0]) & (area < _AREA[1])
    if present.float().mean() < _PRESENT:
        return Reading(NONE, NONE, NONE, background_name)
    centre = _centres(mask)
    return Reading(
        shape=_shape(mask[present], centre[present]),
        colour=_nearest_colour(colour),
        motion=_motion(centre, present, (mask.shape[-2], mask.shape[-1])),
        background=background_name,
    )


def _plain_border(video: torch.Tensor) -> torch.Tensor | None:
    """Median colour `[3]` of the outermost pixels, or None when they do not look alike."""
    import torch

    border = torch.cat(
        [
            video[:, :, :2].flatten(2),
            video[:, :, -2:].flatten(2),
            video[..., :2].flatten(2),
            video[..., -2:].flatten(2),
        ],
        2,
    )
    border = border.transpose(0, 1).flatten(1)  # [3, pixels]
    colour = border.median(dim=1).values
    near = (border - colour[:, None]).norm(dim=0) < 0.5 * _MIN_CONTRAST
    return colour if near.float().mean() >= _PLAIN_BORDER else None


def _opened(mask: torch.Tensor) -> torch.Tensor:
    """Remove specks and threads: an erosion, then a dilation, by 3x3 pixels."""
    import torch.nn.functional as functional

    eroded = 1 - functional.max_pool2d(1 - mask[:, None], 3, 1, 1)
    return functional.max_pool2d(eroded, 3, 1, 1)[:, 0]


def _object_mask(video: torch.Tensor, background: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mask `[F, H, W]` of 0 and 1 cut half-way between background and object, and the object's colour `[3]`."""
    distance = (video - background.view(1, 3, 1, 1)).norm(dim=1)
    rough = _opened((distance > _MIN_CONTRAST).float())
    if rough.mean() < 0.5 * _AREA[0]:
        return None, None
    colour = video.transpose(0, 1)[:, rough > 0].median(dim=1).values
    contrast = (colour - background).norm()
    if contrast < _MIN_CONTRAST:
        return None, None
    return _opened((distance > 0.5 * contrast).float()), colour


def _centres(mask: torch.Tensor) -> torch.Tensor:
    """Centroids `[F, 2]` as (x, y) in pixels."""
    import torch

    area = mask.sum(dim=(1, 2)).clamp_min(1)
    x = torch.arange(mask.shape[2]) + 0.5
    y = torch.arange(mask.shape[1]) + 0.5
    return torch.stack([(mask.sum(1) * x).sum(1) / area, (mask.sum(2) * y).sum(1) / area], 1)


def _shape(mask: torch.Tensor, centre: torch.Tensor) -> str:
    """The shape with the best median overlap with the mask, at equal area and centre."""
    import torch

    area = mask.sum(dim=(1, 2))
    x = (torch.arange(mask.shape[2]) + 0.5 - centre[:, :1])[:, None, :]  # [F, 1, W]
    y = (torch.arange(mask.shape[1]) + 0.5 - centre[:, 1:])[:, :, None]  # [F, H, 1]
    overlap = {}
    for shape in world.SHAPES:
        size, drop = world.size_and_centroid(shape, area)
        ideal = world.signed_distance(shape, x, y + drop.view(-1, 1, 1), size.view(-1, 1, 1)) < 0
        both = (ideal & (mask > 0)).sum(dim=(1, 2))
        either = (ideal | (mask > 0)).sum(dim=(1, 2))
        overlap[shape] = (both / either).median().item()
    best = max(overlap, key=overlap.get)
    return best if overlap[best] >= _MIN_OVERLAP else NONE


def _nearest_colour(colour: torch.Tensor) -> str:
    """The colour of the nearest hue, if the colour is saturated."""
    hue, saturation, value = colorsys.rgb_to_hsv(*colour.clamp(0, 1).tolist())
    if saturation < _MIN_SATURATION or value < _MIN_SATURATION:
        return NONE
    errors = {}
    for name, rgb in world.COLOURS.items():
        gap = abs(hue - colorsys.rgb_to_hsv(*rgb)[0]) * 360
        errors[name] = min(gap, 360 - gap)
    best = min(errors, key=errors.get)
    return best if errors[best] <= _MAX_HUE_ERROR else NONE


def _nearest_background(colour: torch.Tensor) -> str:
    errors = {name: math.dist(colour.tolist(), rgb) for name, rgb in world.BACKGROUNDS.items()}
    best = min(errors, key=errors.get)
    return best if errors[best] <= _MIN_CONTRAST else NONE


def _motion(centre: torch.Tensor, present: torch.Tensor, size: tuple[int, int]) -> str:
    """The direction of the centre: it must go far, mostly along one axis, and steadily."""
    import torch

    if len(centre) < 4:
        return NONE
    time = torch.arange(len(centre), dtype=torch.float32)[present]
    track = centre[present] / torch.tensor([size[1], size[0]])
    quarter = max(1, len(track) // 4)
    travel = track[-quarter:].mean(0) - track[:quarter].mean(0)
    axis = int(travel.abs().argmax())
    if travel[axis].abs() < _MIN_TRAVEL or travel[1 - axis].abs() > 0.5 * travel[axis].abs():
        return NONE
    trend = torch.corrcoef(torch.stack([time, track[:, axis]]))[0, 1]
    if trend.abs() < _MIN_TREND:
        return NONE
    direction = [0, 0]
    direction[axis] = int(travel[axis].sign())
    return next(name for name, step in world.MOTIONS.items() if step == tuple(direction))
