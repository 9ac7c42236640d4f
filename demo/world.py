"""A procedural world of captioned videos: one shape of one colour that moves in one direction on a plain background.

Every caption reads "a red circle moves left on a grey background". There are 3 shapes x 5 colours x 4 motions x
4 backgrounds = 240 captions, 64 of which are held out of training by a fixed rule. Size, start and speed are random
but seeded, and chosen so that the motion cannot be mistaken: the whole object stays in the frame and travels 30 to
45 % of the frame over the clip, whatever the number of frames.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.20),
    "blue": (0.12, 0.25, 0.92),
    "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.85, 0.15, 0.85),
}
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = {
    "grey": (0.50, 0.50, 0.50),
    "black": (0.04, 0.04, 0.04),
    "white": (0.96, 0.96, 0.96),
    "brown": (0.40, 0.26, 0.13),
}

FRAMES, HEIGHT, WIDTH = 33, 128, 128
"""The default size of a video: pixel frames and pixels."""

SIZE_RANGE = (0.34, 0.42)
TRAVEL_RANGE = (0.30, 0.45)
_MARGIN = 0.02
_HALF_EXTENT = 0.55  # of the size: the triangle, the widest shape, has a base of 1.1 sizes

_CAPTION = re.compile(r"a (\w+) (\w+) moves (\w+) on a (\w+) background")


@dataclass(frozen=True)
class Scene:
    """What one video shows.

    Args:
        shape, colour, motion, background: names from `SHAPES`, `COLOURS`, `MOTIONS`, `BACKGROUNDS`.
        size: nominal diameter, as a fraction of the frame.
        start: centre (x, y) in the first frame, as fractions of the frame's width and height.
        travel: distance covered from the first frame to the last, as a fraction of the frame.

    Raises:
        ValueError: for an unknown name, or a size or travel that is not between 0 and 1.
    """

    shape: str
    colour: str
    motion: str
    background: str
    size: float = 0.38
    start: tuple[float, float] = (0.5, 0.5)
    travel: float = 0.375

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("colour", COLOURS), ("motion", MOTIONS), ("background", BACKGROUNDS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known: use one of {', '.join(known)}")
        for name in ("size", "travel"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but must lie between 0 and 1 (fractions of the frame)"
                )

    @property
    def attributes(self) -> tuple[str, str, str, str]:
        """(shape, colour, motion, background)."""
        return self.shape, self.colour, self.motion, self.background

    @property
    def caption(self) -> str:
        return caption(*self.attributes)


def caption(shape: str, colour: str, motion: str, background: str) -> str:
    """The caption of these attributes."""
    return f"a {colour} {shape} moves {motion} on a {background} background"


def parse_caption(text: str) -> tuple[str, str, str, str]:
    """(shape, colour, motion, background) of a caption.

    Raises:
        ValueError: when `text` is not a caption of this world.
    """
    match = _CAPTION.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(
            f"{text!r} is no caption of the demo world: write 'a red circle moves left on a grey background'"
        )
    colour, shape, motion, background = match.groups()
    return Scene(shape, colour, motion, background).attributes


def all_attributes() -> list[tuple[str, str, str, str]]:
    """All 240 combinations, in a fixed order."""
    return list(product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS))


def is_held_out(shape: str, colour: str, motion: str, background: str) -> bool:
    """Whether training must never see this combination.

    The rule is a linear code: (5s + 3c + 4m + b) mod 15 < 4 over the indices of the attributes. It holds out exactly
    64 of the 240 combinations, evenly over every attribute, and leaves every *pair* of values in training.
    """
    s = SHAPES.index(shape)
    c = list(COLOURS).index(colour)
    m = list(MOTIONS).index(motion)
    b = list(BACKGROUNDS).index(background)
    return (5 * s + 3 * c + 4 * m + b) % 15 < 4


def held_out_prompts() -> tuple[str, ...]:
    """The 64 captions that training never sees, in a fixed order."""
    return tuple(caption(*a) for a in all_attributes() if is_held_out(*a))


def training_captions() -> tuple[str, ...]:
    """The 176 captions that training draws from."""
    return tuple(caption(*a) for a in all_attributes() if not is_held_out(*a))


def sample_scene(seed: int | random.Random, attributes: tuple[str, str, str, str] | None = None) -> Scene:
    """A random scene: of the given attributes, or of training attributes drawn uniformly.

    The same integer seed always gives the same scene, on every machine.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    if attributes is None:
        attributes = rng.choice([a for a in all_attributes() if not is_held_out(*a)])
    size = rng.uniform(*SIZE_RANGE)
    travel = rng.uniform(*TRAVEL_RANGE)
    low = _HALF_EXTENT * size + _MARGIN
    across = rng.uniform(low, 1 - low)
    along = rng.uniform(low, 1 - low - travel)
    dx, dy = MOTIONS[attributes[2]]
    start = along if dx + dy > 0 else 1 - along
    return Scene(*attributes, size=size, start=(start, across) if dx else (across, start), travel=travel)


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, size: float | torch.Tensor) -> torch.Tensor:
    """Signed distance to the outline, negative inside; the unit is that of `x`, `y` and `size`."""
    import torch

    if shape == "circle":
        return torch.hypot(x, y) - 0.5 * size
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.45 * size
    # Equilateral triangle, tip up, base 1.1 sizes; y grows downwards and the box is centred on the position.
    base = 1.1 * size
    height = base * 3**0.5 / 2
    y = y - height / 2  # 0 at the base
    side = (x.abs() * 3**0.5 - (y + height)) / 2
    return torch.maximum(y, side)


def size_and_centroid(shape: str, area: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nominal size of a shape that covers `area`, and how far its centroid lies below its centre."""
    import math

    if shape == "circle":
        return 2 * (area / math.pi) ** 0.5, 0 * area
    if shape == "square":
        return area**0.5 / 0.9, 0 * area
    base = (area * 4 / 3**0.5) ** 0.5
    return base / 1.1, base * 3**0.5 / 12


def render(scene: Scene, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """Draw a scene, anti-aliased over one pixel.

    Returns:
        float32 `[F, 3, H, W]` in [0, 1].

    Raises:
        ValueError: when a size is under 1.
    """
    import torch

    if min(frames, height, width) < 1:
        raise ValueError(f"frames, height and width are {frames}, {height}, {width}; each must be at least 1")
    progress = torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)
    dx, dy = MOTIONS[scene.motion]
    centre_x = (scene.start[0] + dx * scene.travel * progress) * width
    centre_y = (scene.start[1] + dy * scene.travel * progress) * height
    x = torch.arange(width) + 0.5 - centre_x[:, None]  # [F, W]
    y = torch.arange(height) + 0.5 - centre_y[:, None]  # [F, H]
    distance = signed_distance(scene.shape, x[:, None, :], y[:, :, None], scene.size * min(height, width))
    cover = (0.5 - distance).clamp(0, 1)[:, None]  # [F, 1, H, W]
    colour = torch.tensor(COLOURS[scene.colour]).view(1, 3, 1, 1)
    background = torch.tensor(BACKGROUNDS[scene.background]).view(1, 3, 1, 1)
    return background + cover * (colour - background)


def training_batch(
    seed: int, batch_size: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH
) -> tuple[torch.Tensor, list[str]]:
    """Videos float32 `[B, F, 3, H, W]` in [0, 1] and their captions, none of them held out."""
    import torch

    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(batch_size)]
    return torch.stack([render(s, frames, height, width) for s in scenes]), [s.caption for s in scenes]
