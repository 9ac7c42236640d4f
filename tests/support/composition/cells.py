"""What comes of one lever on one family, as a cell of the table."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_families import Tiny, build

import vidaccel
from vidaccel import DenseSchedule, VideoLayout, accelerate
from vidaccel.attention import BlockPlan, RandomBlocks, RunReport
from vidaccel.attention.methods.base import PlanMemory
from vidaccel.pipelines.acceleration.rebinding import SparseProcessor

from .levers import Lever

ALL_DENSE, NEVER_DENSE = DenseSchedule(first_steps=10**6), DenseSchedule()
ORDERS = ("before accelerate", "after accelerate")
SAME, PASSES = 3, 5  # where a cache is at work: of one input, the last of them skipped; and some that differ a little
PACKAGE = Path(vidaccel.__path__[0])


@dataclass(frozen=True, kw_only=True)
class SameBlocks(RandomBlocks):
    """In every call: they depend neither on rounding nor on which layers a cache left out before."""

    def plan(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: VideoLayout, memory: Any) -> BlockPlan:
        return super().plan(q, k, v, layout, PlanMemory(heads=memory.heads))


SPARSE = SameBlocks(density=0.5)
CLOSE = {"atol": 5e-5, "rtol": 1e-4}

FAMILY_BUILDS = {  # the tiny model that stands for a family
    "Wan 2.1 / 2.2": "wan_i2v",
    "Wan VACE": "wan_vace",
    "Wan Animate": "wan_animate",
    "ChronoEdit": "chronoedit",
    "SkyReels V2": "skyreels_v2",
    "AnyFlow": "anyflow",
    "Helios": "helios",
    "HunyuanVideo": "hunyuan_video",
    "HunyuanVideo Framepack": "hunyuan_framepack",
    "HunyuanVideo 1.5": "hunyuan_video_15",
    "CogVideoX": "cogvideox_5b",
    "ConsisID": "consisid",
    "EasyAnimate": "easyanimate",
    "Mochi 1": "mochi",
    "LTX-Video": "ltx",
    "LTX-2": "ltx2_3",
    "Cosmos 1 / Predict2 / 2.5": "cosmos_25",
    "Cosmos 3": "cosmos_3",
    "Kandinsky 5": "kandinsky5",
    "Kandinsky 6": "kandinsky6",
    "Allegro": "allegro",
    "Motif-Video": "motif_video",
    "MiniMax-H3": "minimax_h3",
}


def compute(family: str, lever: Lever) -> str | dict[str, str]:
    """What comes of a lever on a family: one outcome, or one for each order where they differ.

    An outcome is `works`, or a kind and a text: `absent` (diffusers has no such thing for this class), `told` (it runs
    dense, and the report says so), `refused` (by us), `upstream` (the same error with and without vidaccel). What is
    none of these is raised. `upstream` is also what a cache makes of one input, where that is another output than the
    model's own, with and without vidaccel.
    """
    tiny = model_for(family, lever.caches)
    absent = lever.missing(tiny.model)
    if absent:
        return f"absent: {absent}"
    plain = copy.deepcopy(tiny)
    if lever.lazy:
        return outcome(plain, lever, ORDERS[0], passes(plain, lever), lambda: expectation(family, plain, plain, lever))
    try:
        lever.apply(tiny)
        stock = passes(tiny, lever)
    except Exception as error:
        fault = worded(error)
        for order in ORDERS:
            try:
                accelerated(copy.deepcopy(plain), lever, order)
            except Exception as ours:
                assert worded(ours) == fault, f"another error with vidaccel: {worded(ours)}"
            else:
                raise AssertionError(f"no error with vidaccel, and without: {fault}") from error
        return f"upstream: {fault}"
    if lever.caches and (fault := strays(stock, plain.run())):
        for order in ORDERS:
            ours = accelerated(copy.deepcopy(plain), lever, order).outs
            assert strays(ours, expectation(family, plain, tiny, lever)), f"only without vidaccel, {fault}"
        return f"upstream: {fault}"
    expected = functools.cache(lambda: expectation(family, plain, tiny, lever))
    outcomes = {order: outcome(plain, lever, order, stock, expected) for order in ORDERS}
    return outcomes[ORDERS[0]] if len(set(outcomes.values())) == 1 else outcomes


def outcome(
    plain: Tiny, lever: Lever, order: str, stock: list[torch.Tensor], expected: Callable[[], torch.Tensor]
) -> str:
    """What comes of one order.

    Args:
        plain: without the lever.
        stock: outputs of a model with it, never accelerated.
        expected: makes the sparse output that it stands for.
    """
    tiny = copy.deepcopy(plain)
    try:
        sparse, report, calls = accelerated(tiny, lever, order)
    except Exception as error:
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if last.is_relative_to(PACKAGE) and not last.is_relative_to(PACKAGE / "tests"):
            return f"refused: {worded(error)}"
        raise
    assert not any(isinstance(getattr(m, "processor", None), SparseProcessor) for m in tiny.model.modules())
    if not lever.caches and not lever.lazy:  # a cache remembers what came before
        assert all(a.equal(b) for a, b in zip(passes(tiny, lever), stock, strict=True)), "remove() left a trace"
    replaced = [note for note in report.notes if "were replaced after accelerate" in note]
    if replaced:
        assert not report.records, "processors that were replaced, and sparse calls all the same"
        close(sparse, stock)
        return f"told: {replaced[0].partition(' (')[0]}"
    ran = list(by_pass(report).values())
    assert not any(r.reason for r in report.records), "dense calls where none should be"
    assert ran[0] == Counter(range(plain.layers)), f"sparse calls by layer in the first pass: {ran[0]}"
    if lever.caches:
        assert calls[SAME - 1] < plain.layers, f"nothing was left out of pass {SAME} of the same input: calls {calls}"
        assert not (stray := strays(sparse, expected())), f"with vidaccel, {stray}"
        if order == ORDERS[0]:  # cached and dense: what the cache gives without us
            tiny = copy.deepcopy(plain)
            close(accelerated(tiny, lever, order, ALL_DENSE).outs, stock)
    assert not torch.allclose(sparse[0], stock[0], **CLOSE), "the sparse output is the dense one"
    if lever.exact:
        assert sparse[0].equal(expected()), "not to the bit what it should be"
    close(sparse[:1], [expected()])
    return "works"


class Accelerated(NamedTuple):
    """What a model under sparse attention made: its outputs, the report, and the calls in each pass."""

    outs: list[torch.Tensor]
    report: RunReport
    calls: list[int]


def accelerated(tiny: Tiny, lever: Lever, order: str, schedule: DenseSchedule = NEVER_DENSE) -> Accelerated:
    """Outputs of a model with the lever under sparse attention, which is removed again."""
    if order == ORDERS[0]:
        lever.apply(tiny)
    with accelerate(tiny.model, SPARSE, schedule=schedule) as handle:
        if order != ORDERS[0]:
            lever.apply(tiny)
        counts = [0]
        outs = passes(tiny, lever, lambda: counts.append(len(handle.report().records)))
        calls = [after - before for before, after in itertools.pairwise(counts)]
        return Accelerated(outs, handle.report(), calls)


def expectation(family: str, plain: Tiny, used: Tiny, lever: Lever) -> torch.Tensor:
    """Sparse output of a model without the lever, with the weights that the lever stands for."""
    if lever.same_as is None:
        return sparse_output(family, lever.caches)
    fresh = copy.deepcopy(plain)
    lever.same_as(used.model, fresh.model)
    return sparse(fresh)


def model_for(family: str, caches: bool) -> Tiny:
    """A cache runs the first block of each stack, and leaves out later ones."""
    return build(FAMILY_BUILDS[family], 4 if caches else 2)


@functools.cache
def sparse_output(family: str, caches: bool) -> torch.Tensor:
    """That of the model itself, which most levers stand for."""
    return sparse(model_for(family, caches))


def sparse(fresh: Tiny) -> torch.Tensor:
    with accelerate(fresh.model, SPARSE, schedule=NEVER_DENSE):
        return fresh.run()


def passes(tiny: Tiny, lever: Lever, after: Callable[[], None] = lambda: None) -> list[torch.Tensor]:
    """The output of a forward pass; where a cache is at work, of several. `after` is called after each."""
    changes = [*[{}] * SAME, *[tiny.changed(0, 1, 2)] * (PASSES - SAME)] if lever.caches else [{}]
    context = getattr(tiny.model, "cache_context", None) if lever.caches else None
    outs = []
    with context("cond") if context else contextlib.nullcontext():
        for each in changes:
            outs.append(tiny.run(**each))
            after()
    return outs


def strays(outs: list[torch.Tensor], expected: torch.Tensor) -> str:
    """How far a cache is off where it should change nothing: in the first pass, or in a skipped one of that input."""
    for which, out in (("the first step", outs[0]), ("a step that is skipped on the same input", outs[SAME - 1])):
        off = ((out - expected).abs().max() / expected.abs().max()).item()
        if not off < 1e-4:
            return f"{which} is off by {off:.1g} of the largest value"
    return ""


def by_pass(report: RunReport) -> dict[tuple[int, str], Counter[int]]:
    """How often each layer ran in each forward pass, by run and branch: a transformer alone counts its timesteps."""
    ran: dict[tuple[int, str], Counter[int]] = {}
    for record in report.records:
        ran.setdefault((record.run, record.branch), Counter())[record.layer] += 1
    return ran


def close(outs: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for out, other in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, other, **CLOSE)


def worded(error: Exception) -> str:
    """The first line of an error, with classes by their short names."""
    text = next(iter(str(error).strip().splitlines()), "")
    text = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", text)
    return f"{type(error).__name__}: {text}"[:200]
