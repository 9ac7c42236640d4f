"""One forward pass of a native model, and which of its attention calls can be sparse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...attention import StepInfo, VideoLayout
from .geometry import Geometry


@dataclass
class ForwardPass:
    """One forward pass of the model, and a count of its self-attention calls.

    Args:
        step: where the sampler is.
        branches: guidance branches in the order in which they lie in the batch.
        batch: B of its attention calls.
        layout: the sequence of its self-attention calls; None where there is no video that is known.
        reason: why the whole pass stays dense, empty when it may be sparse.
        geometry: of the model, None when it is not known.
        layers: of the model.
        by_length: whether it may be sparse shows in its first call over the video.
        offsets, main_layers, extra_calls, silent: see `Geometry`.
        offered: attention calls of any kind.
        calls: those over the video, of the model's own blocks. place: of the next one among those that are counted.
        says_index: whether the model says its `block_index`.
        given: what the self-attention layer at work was given, `[B, N, C]`; see `Gates`.
        made: the layers of these calls. again: of those to come in the backward pass; None before it.
    """

    step: StepInfo
    branches: list[str]
    batch: int
    layout: VideoLayout | None
    reason: str
    geometry: Geometry | None
    layers: int = 0
    by_length: bool = False
    offsets: dict[str, int] = field(default_factory=dict)
    main_layers: int = 0
    extra_calls: Mapping[int, int] = field(default_factory=dict)
    silent: frozenset[int] = frozenset()
    offered: int = 0
    calls: int = 0
    place: int = 0
    says_index: bool = False
    extra: int = 0
    seen: Counter[int] = field(default_factory=Counter)
    given: torch.Tensor | None = None
    made: list[int] = field(default_factory=list)
    again: list[int] | None = None

    def run_again(self) -> None:
        """The backward pass begins, in which gradient checkpointing runs the blocks again, from the last to the first.

        By then `block_index` says nothing: models write it into options that all their blocks share.
        """
        self.again = list(self.made)

    def told_of_replaced(self, patches: Mapping[str, Any]) -> dict[str, Any]:
        """`patches_replace` whose entries for blocks say where the pass is.

        By these alone the count of calls knows what was skipped: in a model that does not say its `block_index`, and
        where extra blocks run under the index of a block, whose call theirs would otherwise be taken for.
        """

        def told(place: Any, patch: Callable[..., Any]) -> Callable[..., Any]:
            block = place[1] if isinstance(place, tuple) and len(place) == 2 and len(self.offsets) == 1 else None
            if not isinstance(block, int):
                return patch

            def call(*args: Any, **kwargs: Any) -> Any:
                self.place = sum(layer < block for layer in self._in_turn())
                out = patch(*args, **kwargs)
                self.place = sum(layer <= block for layer in self._in_turn())
                self.seen[block] = max(1, self.seen[block])
                return out

            return call

        return {**patches, "dit": {place: told(place, patch) for place, patch in patches["dit"].items()}}

    def layer(self, options: dict[str, Any]) -> int | None:
        """The number of the layer that makes the next call of the video's length.

        Models that say their `block_index` are believed, so blocks that another node skips do not shift the count.
        Further calls under one index are those of extra blocks (VACE), counted behind the others, as many as the model
        has there.

        Returns:
            None for a call that none of the model's blocks makes: another node's, such as cross-attention with as many
            text tokens as the video has.
        """
        if self.again is not None:
            return self.again.pop() if self.again else None
        layer = self._next_layer(options)
        if layer is not None:
            self.made.append(layer)
        return layer

    def _in_turn(self) -> list[int]:
        """The layers that make a call, in their order."""
        return [n for n in range(self.main_layers + sum(self.extra_calls.values())) if n not in self.silent]

    def _next_layer(self, options: dict[str, Any]) -> int | None:
        index = options.get("block_index")
        if index is None:
            layers = self._in_turn()
            if self.place >= len(layers):
                return None
            self.calls += 1
            self.place += 1
            return layers[self.place - 1]
        self.says_index = True
        # Where there is one kind of blocks, a model may call it as it likes.
        offset = 0 if len(self.offsets) < 2 else self.offsets.get(options.get("block_type", ""))
        if offset is None:
            return None
        layer = offset + int(index)
        if layer >= self.main_layers or self.seen[layer] > self.extra_calls.get(layer, 0):
            return None
        self.calls += 1
        self.seen[layer] += 1
        if self.seen[layer] == 1:
            return layer
        self.extra += 1
        return self.main_layers + self.extra - 1


def unfit_reason(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, split: bool, mask: Any, kwargs: dict[str, Any]
) -> str:
    """Why a self-attention call cannot be sparse, empty when it can."""
    if mask is not None:
        return "attention mask"
    if q.shape != k.shape or q.shape != v.shape:
        return "keys or values of another shape"
    if not q.dtype == k.dtype == v.dtype:
        return "queries, keys and values of different dtypes"
    if kwargs.get("attn_precision") not in (None, q.dtype):
        return "attention in another precision"
    head_dim = q.shape[-1] if split else q.shape[-1] // heads
    scale = kwargs.get("scale")
    if scale is not None and abs(scale * head_dim**0.5 - 1) > 1e-6:
        return "another scale of the scores"
    return ""
