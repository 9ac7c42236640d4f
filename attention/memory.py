"""What an engine keeps between calls for its method: by layer, guidance branch, layout and batch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from .heads import HeadShare
from .layout import VideoLayout
from .methods import PlanMemory

KEPT_LAYOUTS = 4  # what SVG keeps of one layout is about 21 MB at 75,600 tokens

Place = tuple[VideoLayout, torch.device]


def kept_layouts(in_a_pass: int) -> int:
    """How many layouts something is kept of, where a forward pass has so many: more than those of one pass, since two
    prompts of unlike length come in turn."""
    return max(KEPT_LAYOUTS, 2 * in_a_pass)


class Kept(NamedTuple):
    """Of one call, see `PlanMemory`; `heads` are those that it is of."""

    call: dict[str, Any]
    counts: dict[str, int]
    drawn: dict[str, Any]
    heads: HeadShare


class EngineMemory:
    """The memories of all calls, of which those of the layouts that were used last stay."""

    def __init__(self) -> None:
        self.turn = 0
        """See `PlanMemory`."""
        self.layouts: dict[Place, dict[Any, Any]] = {}  # the one that was used last is the last
        self.forget_run()

    def forget_run(self) -> None:
        """Forget what is of one run alone."""
        self.calls: dict[tuple, Kept] = {}  # by what tells a call from others of its place, and the place
        self._run: dict[str, Any] = {}

    def forget_branches(self, branches: Collection[str]) -> None:
        """Forget what is kept for some guidance branches."""
        self.calls = {key: kept for key, kept in self.calls.items() if key[1] not in branches}

    def of(self, call: tuple, place: Place, heads: HeadShare, in_a_pass: int) -> PlanMemory:
        """The memory of a call.

        Args:
            call: what tells it from the others of the place; the second part is its guidance branch.
            place: layout and device.
            heads: of the layer, in this process; what is kept of others is brought to them.
            in_a_pass: layouts of the forward pass.
        """
        key = (*call, *place)
        kept = self.calls.get(key, Kept({}, {}, {}, heads))
        if heads is not kept.heads:
            kept = kept._replace(call=heads.taken_over(kept.call, kept.heads), heads=heads)
        self.calls[key] = kept
        of_place = self._of_place(place, in_a_pass)
        return PlanMemory(kept.call, of_place, self._run, heads, kept.counts, kept.drawn, self.turn)

    def _of_place(self, place: Place, in_a_pass: int) -> dict[Any, Any]:
        """That of a layout on a device, which is now the one used last; what is kept of layouts of long ago goes."""
        self.layouts[place] = memory = self.layouts.pop(place, {})
        last = list(dict.fromkeys(layout for layout, _ in reversed(self.layouts)))[: kept_layouts(in_a_pass)]
        gone = [known for known in self.layouts if known[0] not in last]
        for old in gone:
            del self.layouts[old]
        if gone:
            self.calls = {key: kept for key, kept in self.calls.items() if key[-2:] not in gone}
        return memory
