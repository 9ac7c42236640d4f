"""From how many tokens sparse attention pays on a machine: measured, coarse to fine, in bounded time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...pipelines.break_even import BreakEven
from ..levers.methods import DEFAULT_METHOD
from ..machine import synchronise

if TYPE_CHECKING:
    import torch

Times = Callable[[int], tuple[float, float]]
"""Tokens -> seconds of a dense and of a sparse call; tokens are a multiple of `FRAME`."""

FRAME = 256
SHORTEST, LONGEST = 1024, 65536
GAIN = 0.97
"""Sparse pays where it takes at most this share of the dense time; what is nearer to 1 is noise."""
_STEPS = 3


def find_break_even(
    times: Times, *, seconds: float = 30.0, longest: int = LONGEST, clock: Callable[[], float] = time.perf_counter
) -> BreakEven:
    """Double the length until sparse pays, then halve the gap twice.

    Args:
        times: measures a length.
        seconds: no length is begun that would go beyond these, as far as can be foreseen: dense attention takes four
            times as long at twice the length. The first two are measured in any case.
        longest: that is tried.
        clock: of `seconds`.
    """
    points: list[tuple[int, float, float]] = []
    begin = clock()
    took: list[float] = []

    def pays(tokens: int) -> bool:
        start = clock()
        dense, sparse = times(tokens)
        took.append(clock() - start)
        points.append((tokens, dense, sparse))
        return sparse <= GAIN * dense

    def fits(factor: float) -> bool:
        return len(took) < 2 or clock() - begin + factor * took[-1] <= seconds

    until, found, tokens = 0, None, SHORTEST
    while tokens <= longest and fits(4.0):
        if pays(tokens) and pays(tokens):  # twice: one slow call of dense is no gain
            found = tokens
            break
        until, tokens = tokens, 2 * tokens
    if found is not None and until:
        for _ in range(2):
            middle = round((until * found) ** 0.5 / FRAME) * FRAME
            if not until < middle < found or not fits(1.0):
                break
            if pays(middle):
                found = middle
            else:
                until = middle
    return BreakEven(found, until, tuple(points))


def timer(heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, method: str = DEFAULT_METHOD) -> Times:
    """Measures attention calls of a model's heads: a step of a method under "auto", and torch's dense one.

    All else in a step is the same for both, so a step is faster from where its attention is. The keys come in groups,
    as those of a model do; density is the method's own. The first step, which clusters from nothing and compiles, is
    not counted: it is one of many.
    """
    import torch

    from ...attention import METHODS, DenseSchedule, SparseAttention, StepInfo, VideoLayout

    def times(tokens: int) -> tuple[float, float]:
        layout = VideoLayout(tokens // FRAME, 16, 16)
        generator = torch.Generator().manual_seed(0)

        def drawn() -> torch.Tensor:
            centres = torch.randn(1, heads, 32, head_dim, generator=generator)
            own = torch.randn(1, heads, tokens, head_dim, generator=generator)
            return (centres[:, :, torch.randint(32, (tokens,), generator=generator)] + own).to(device, dtype)

        q, k, v = drawn(), drawn(), drawn()
        engine = SparseAttention(METHODS[method](), num_layers=1, schedule=DenseSchedule())
        dense, sparse = [], []
        for step in range(_STEPS + 1):
            dense.append(_timed(device, lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)))
            engine.enter(StepInfo(0, step, _STEPS + 1), layout)
            sparse.append(_timed(device, lambda: engine(q, k, v, 0)))
        return statistics.median(dense[1:]), statistics.fmean(sparse[1:])  # one of the three clusters anew

    return times


def _timed(device: torch.device, call: Callable[[], Any]) -> float:
    import torch

    with torch.inference_mode():
        synchronise(device)
        start = time.perf_counter()
        call()
        synchronise(device)
        return time.perf_counter() - start
