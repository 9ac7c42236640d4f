"""What comes of one lever on one family, as a cell of the table."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_families import Tiny, build

import vidaccel
from vidaccel import DenseSchedule, accelerate
from vidaccel.attention import RandomBlocks, RunReport
from vidaccel.pipelines.acceleration.rebinding import SparseProcessor

from .levers import Lever

ALL_DENSE, NEVER_DENSE = DenseSchedule(first_steps=10**6), DenseSchedule()
SPARSE = RandomBlocks(density=0.5, redraw=False)  # blocks that do not depend on rounding
ORDERS = ("before accelerate", "after accelerate")
PASSES = 4  # where a cache is at work: two, and two that differ from them a little
PACKAGE = Path(vidaccel.__path__[0])
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
    none of these is raised.
    """
    # A cache runs the first block of each stack, and leaves out later ones.
    tiny = build(FAMILY_BUILDS[family], 4 if lever.caches else 2)
    absent = lever.missing(tiny.model)
    if absent:
        return f"absent: {absent}"
    plain = copy.deepcopy(tiny)
    if lever.lazy:
        return outcome(plain, lever, ORDERS[0], passes(plain, lever), lambda: reference(plain, plain, lever))
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
    expected = functools.cache(lambda: reference(plain, tiny, lever))
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
        sparse, report = accelerated(tiny, lever, order)
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
        calls = sum(sum(layers.values()) for layers in ran)
        assert calls < PASSES * plain.layers, f"nothing was cached: {calls} calls in {PASSES} passes"
        if order == ORDERS[0]:  # cached and dense: what the cache gives without us
            tiny = copy.deepcopy(plain)
            close(accelerated(tiny, lever, order, ALL_DENSE)[0], stock)
    assert not torch.allclose(sparse[0], stock[0], **CLOSE), "the sparse output is the dense one"
    if lever.exact:
        assert sparse[0].equal(expected()), "not to the bit what it should be"
    close(sparse[:1], [expected()])
    return "works"


def accelerated(
    tiny: Tiny, lever: Lever, order: str, schedule: DenseSchedule = NEVER_DENSE
) -> tuple[list[torch.Tensor], RunReport]:
    """Outputs of a model with the lever under sparse attention, which is removed again."""
    if order == ORDERS[0]:
        lever.apply(tiny)
    with accelerate(tiny.model, SPARSE, schedule=schedule) as handle:
        if order != ORDERS[0]:
            lever.apply(tiny)
        return passes(tiny, lever), handle.report()


def reference(plain: Tiny, used: Tiny, lever: Lever) -> torch.Tensor:
    """Sparse output of a model without the lever, with the weights that the lever stands for."""
    fresh = copy.deepcopy(plain)
    lever.same_as(used.model, fresh.model)
    with accelerate(fresh.model, SPARSE, schedule=NEVER_DENSE):
        return fresh.run()


def passes(tiny: Tiny, lever: Lever) -> list[torch.Tensor]:
    """The output of a forward pass; where a cache is at work, of several."""
    if not lever.caches:
        return [tiny.run()]
    context = getattr(tiny.model, "cache_context", None)
    with context("cond") if context else contextlib.nullcontext():
        return [tiny.run(**changes) for changes in (*[{}] * 2, *[tiny.changed(0, 1, 2)] * (PASSES - 2))]


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
