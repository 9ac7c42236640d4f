"""The processes that make one video together, one for each GPU, and what of the work they share.

Two things can be shared, alone or together: guidance, each of whose branches one process computes
(`vidaccel.cfg_parallel`), and the sequence of tokens (Ulysses, diffusers' own). Which of them suits a request is known
before weights are read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import BadInput, mention

if TYPE_CHECKING:
    import torch

    from ..attention.layout import VideoLayout
    from ..pipelines.presets import Preset
    from .models.facts import ModelFacts
    from .requests.settings import Settings

GUIDANCE, SEQUENCE = "guidance", "sequence"
SHARED = ("auto", GUIDANCE, SEQUENCE, "both")
"""What a request can ask to have shared."""


@dataclass(frozen=True)
class Process:
    """One of the processes, as torchrun tells it.

    Args:
        rank: among all of them. local: among those of this machine, and the number of its GPU. count: of them all.
        here: how many this machine has.
    """

    rank: int = 0
    local: int = 0
    count: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        """The one that decodes, writes and speaks."""
        return self.rank == 0

    @classmethod
    def this(cls) -> Process:
        """Of the environment; a process alone where nothing is said.

        Raises:
            BadInput: what it says cannot be.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        if any(name not in os.environ for name in names):
            return cls()
        rank, local, count, here = (_whole_number(name) for name in names)
        for part, value, whole, bound in (names[0], rank, names[2], count), (names[1], local, names[3], here):
            if bound < 1:
                raise BadInput(whole, "it must be at least 1", _BY_TORCHRUN, value=bound)
            if value >= bound:
                raise BadInput(part, f"it must be below {whole}, which is {bound}", _BY_TORCHRUN, value=value)
        if here > count:
            problem = f"it must be at most WORLD_SIZE, which is {count}"
            raise BadInput("LOCAL_WORLD_SIZE", problem, _BY_TORCHRUN, value=here)
        if count > 1:
            _check_meeting_place()
        return cls(rank, local, count, here)


_BY_TORCHRUN = f"torchrun sets it, and {mention('processes')} without it; for one process alone, unset WORLD_SIZE."
"""What to do about a variable of the environment."""


def _whole_number(name: str) -> int:
    value = os.environ[name]
    if not (value.isascii() and value.isdecimal()):
        raise BadInput(name, "it must be a whole number", _BY_TORCHRUN, value=repr(value))
    return int(value)


def _check_meeting_place() -> None:
    """Raise BadInput where the environment does not say where several processes meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise BadInput(name, "is not set, and WORLD_SIZE is above 1", _BY_TORCHRUN)
    if not 0 < (port := _whole_number("MASTER_PORT")) < 2**16:
        raise BadInput("MASTER_PORT", f"it must be from 1 to {2**16 - 1}", _BY_TORCHRUN, value=port)


@dataclass(frozen=True)
class Sharing:
    """How many processes share guidance, 1 or 2, and how many each sequence."""

    guidance: int = 1
    sequence: int = 1
    anything: bool = False
    """Whether the parts of a sequence, or of its heads, differ in size."""

    @property
    def processes(self) -> int:
        return self.guidance * self.sequence

    def in_words(self) -> str:
        parts = ["guidance by two"] if self.guidance > 1 else []
        parts += [f"each sequence by {self.sequence}"] if self.sequence > 1 else []
        return f"{self.processes} processes share {' and '.join(parts)}" if parts else "one process"


ALONE, NOTHING = Process(), Sharing()


def check_count(count: int, device: torch.device, here: int) -> None:
    """Raise BadInput for more processes on a machine than it has GPUs.

    Args:
        count: of all. device: of the request. here: how many of them are on this machine.
    """
    import torch

    if count == 1:
        return
    if device.index is not None:
        raise BadInput(
            "device", f"each of the {mention('processes')} has its own", f"Give {device.type}.", value=device
        )
    there = here if device.type == "cpu" else torch.accelerator.device_count()
    if here > there:
        what = f"each has a device of its own, and there are {there}"
        raise BadInput("processes", what, f"Give {there} at the most.", value=here)


def share_out(
    count: int,
    wanted: str,
    facts: ModelFacts,
    settings: Settings,
    layout: VideoLayout,
    one_pass: bool,
    beside: Preset | None,
    device: torch.device,
) -> Sharing:
    """What of a request so many processes share.

    Args:
        count: of processes.
        wanted: of `SHARED`; "auto" shares guidance where it can be and the number is even, and the sequence by what is
            left.
        facts, settings, layout: of the model and the video.
        one_pass: guidance is in one pass.
        beside: what runs beside sparse attention.
        device: of the request.

    Raises:
        BadInput: it cannot be, and why.
    """
    if wanted not in SHARED:
        raise BadInput("share", f"it must be {', '.join(SHARED[:-1])} or {SHARED[-1]}", value=wanted)
    if count == 1:
        if wanted != "auto":
            problem = "is of no use: one process has nothing to share"
            raise BadInput("share", problem, f"Give {mention('processes')}, or start it by torchrun.")
        return NOTHING
    why_not_guidance = _unshared_guidance(facts, settings, one_pass, beside)
    branches = 2 if wanted in (GUIDANCE, "both") or (wanted == "auto" and not why_not_guidance and not count % 2) else 1
    if branches == 2 and why_not_guidance:
        raise BadInput("share", why_not_guidance, f"Give {SEQUENCE}.", value=wanted)
    if branches == 2 and (count % 2 or (wanted == GUIDANCE and count != 2)):
        fix = "Give 2." if wanted == GUIDANCE else "Give an even number."
        problem = f"guidance has two branches, and {mention('share')} is {wanted}"
        raise BadInput("processes", problem, fix, value=count)
    sequence = count // branches
    if sequence == 1:
        if wanted == "both":
            raise BadInput("processes", "guidance alone takes two", "Give 4 or another even number.", value=count)
        return Sharing(branches)
    if why := _unshared_sequence(facts, beside):
        fix = "" if why_not_guidance else f"Guidance can be shared, by 2 {mention('processes')}."
        if wanted in ("auto", GUIDANCE):
            raise BadInput("processes", why, fix, value=count)
        raise BadInput("share", why, fix, value=wanted)
    heads, _ = facts.row.heads(facts.transformer)
    anything = bool(heads % sequence or layout.tokens % sequence)
    if -(-heads // sequence) * (sequence - 1) >= heads:
        problem = f"{sequence} share each sequence, of which each needs heads of its own, and the model has {heads}"
        raise BadInput("processes", problem, "Give fewer.", value=count)
    if device.type == "cpu" and layout.tokens % sequence:
        # diffusers gathers the parts at the end, and gloo, which does that on a CPU, takes parts of one size alone
        problem = (
            f"{sequence} share each sequence, on a CPU in equal parts alone, and the video has {layout.tokens} tokens"
        )
        even = [n for n in range(2, sequence) if not layout.tokens % n and -(-heads // n) * (n - 1) < heads]
        fix = f"Give a size or length whose tokens are a multiple of {sequence}"
        fix += f", or {branches * even[-1]} {mention('processes')}." if even else "."
        raise BadInput("processes", problem, fix, value=count)
    return Sharing(branches, sequence, anything)


def _unshared_guidance(facts: ModelFacts, settings: Settings, one_pass: bool, beside: Preset | None) -> str:
    """Why no two processes can share the guidance of a request; "" where they can."""
    from ..pipelines.acceleration.families import family_of
    from ..pipelines.cfg_parallel.handle import unshared_guidance
    from ..pipelines.guidance_branches import tells_guidance
    from ..pipelines.loading import find_class

    if one_pass:
        return "guidance is in one pass, so there is no second one to share"
    if settings.guidance_scale is None or settings.guidance_scale <= 1:
        return "there is no guidance to share"
    if beside is not None and beside.guidance_cache is not None:
        return "the guidance cache leaves second passes out, so there is little to share"
    family = family_of(facts.pipeline_class)
    if family is None:
        return f"the branches of a {facts.pipeline_class} are not known"
    kind = find_class(facts.pipeline_class)
    return unshared_guidance(kind, family, tells_guidance(kind))


def _unshared_sequence(facts: ModelFacts, beside: Preset | None) -> str:
    """Why processes cannot share a sequence; "" where they can."""
    from ..pipelines.acceleration.support import unshared_sequence
    from ..pipelines.presets.levers import unshared_cache

    # The weights of an adapter alone do not say which class they are for.
    if why := unshared_sequence(facts.pipeline_class, str(facts.transformer.get("_class_name", ""))):
        return why
    cache = None if beside is None else beside.cache
    if cache is not None and (why := unshared_cache(cache.name)):
        return why
    if beside is not None and beside.compile is not None:
        return "compiled blocks have not been run with a shared sequence"
    return ""
