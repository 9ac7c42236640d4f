"""What a LoRA for longer videos was trained with: the mask, the frames and the rotary embedding, from its header."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...attention.methods import Method
from ...attention.methods.description import describe, described
from .settings import Riflex

RECIPE = "length"
"""The recipe that makes such LoRAs, and the key of the header under which it says what follows."""


class LengthError(ValueError):
    """A LoRA for longer videos that cannot be used as asked for; the message names the difference, and the fix."""


@dataclass(frozen=True)
class TrainedLength:
    """The attention that a LoRA for longer videos belongs to.

    Args:
        method: of the self-attention, with the layers that stay dense; None for dense.
        density: share of the pairs that it computed, at `frames`; 1 for dense.
        base_frames: latent frames of the videos that the model itself was trained on.
        frames: most latent frames of the training.
        riflex: of the rotary embedding; None where it was left plain.
        name: of the file, for messages.
    """

    method: Method | None
    density: float
    base_frames: int
    frames: int
    riflex: Riflex | None = None
    name: str = "the LoRA"

    def __str__(self) -> str:
        """In a few words: "radial at density 0.29, up to 17 latent frames"."""
        kind = "dense" if self.method is None else f"{self.method.name} at density {self.density:.2f}"
        return f"{kind}{'' if self.riflex is None else ', RIFLEx'}, up to {self.frames} latent frames"

    def check_method(self, asked: Method | None) -> None:
        """Raise LengthError for another attention than that of the training, whose differences are named.

        Args:
            asked: the method, None for dense.
        """
        if found := _differences(self.method, asked):
            raise LengthError(
                f"{self.name} was trained with the attention that its file states, and this is another: "
                f"{'; '.join(found)}. Leave the method and its settings out, and those of the file are used."
            )

    def check_frames(self, frames: int) -> None:
        """Raise LengthError for a video of more latent frames than those of the training."""
        if frames > self.frames:
            raise LengthError(
                f"the video has {frames} latent frames, and {self.name} was trained up to {self.frames}: give a "
                "shorter one, or train on longer ones."
            )


def facts_of_length(trained: TrainedLength) -> dict[str, Any]:
    """What the header says, of which `trained_length` makes the same again."""
    dense = {"method": "dense", "settings": {}, "schedule": None}
    return {
        **(dense if trained.method is None else describe(trained.method)),
        "density": round(trained.density, 4),
        "base_frames": trained.base_frames,
        "frames": trained.frames,
        "riflex": None if trained.riflex is None else dataclasses.asdict(trained.riflex),
    }


def trained_length(facts: Mapping[str, Any], name: str) -> TrainedLength | None:
    """What the header of a file says; None of one that the recipe `length` did not make.

    Args:
        facts: of the header.
        name: of the file, for messages.

    Raises:
        LengthError: it is incomplete, or of a method that there is not.
    """
    if facts.get("recipe") != RECIPE:
        return None
    try:
        stated = facts[RECIPE]
        attention = {name: stated[name] for name in ("method", "settings", "schedule")}
        method = None if stated["method"] == "dense" else described(attention)
        riflex = None if stated["riflex"] is None else Riflex(**stated["riflex"])
        numbers = float(stated["density"]), int(stated["base_frames"]), int(stated["frames"])
        return TrainedLength(method, *numbers, riflex, name)
    except (KeyError, TypeError, ValueError) as error:
        raise LengthError(
            f"the header of {name} cannot be used ({type(error).__name__}: {error}): it is of another version, or "
            "incomplete. Train it again."
        ) from error


def _differences(trained: Method | None, asked: Method | None) -> list[str]:
    """ "what A then, B now" of two methods, None for dense."""
    names = ["dense" if method is None else method.name for method in (trained, asked)]
    if names[0] != names[1]:
        return [f"method {names[0]} then, {names[1]} now"]
    if trained is None or asked is None or trained == asked:
        return []
    before, now = ({**_plain(method), **_plain(method.schedule)} for method in (trained, asked))
    return [f"{name} {before[name]} then, {now[name]} now" for name in before if before[name] != now[name]]


def _plain(settings: Any) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name != "schedule"}
