"""What comes of one lever on one family, as a cell of the table."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
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


def expected_file() -> Path:
    """What is expected of every cell: `{family: {lever: cell}}`."""
    return Path(__file__).parents[2] / "data" / "composition.json"


def compute(family: str, lever: Lever) -> str | dict[str, str]:
    """What comes of a lever on a family: one outcome, or one for each order where they differ.

    An outcome is `works`, or a kind and a text: `absent` (diffusers has no such thing for this class), `told` (it runs
    dense, and the report says so), `refused` (by us), `upstream` (the same error without vidaccel). What is none of
    these is an `AssertionError` or whatever was raised.
    """
    name = FAMILY_BUILDS[family]
    absent = lever.missing(build(name).model)
    if absent:
        return f"absent: {absent}"
    try:
        tiny = build(name)
        lever.apply(tiny)
        stock = passes(tiny, lever)
    except Exception as error:
        return f"upstream: {worded(error)}"
    outcomes = {order: one_order(name, lever, order, stock) for order in ORDERS}
    return outcomes[ORDERS[0]] if len(set(outcomes.values())) == 1 else outcomes


def one_order(name: str, lever: Lever, order: str, stock: list[torch.Tensor]) -> str:
    try:
        dense, report = accelerated(name, lever, order, ALL_DENSE, stock)
        sparse, report = accelerated(name, lever, order, NEVER_DENSE, stock)
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if Path(files[-1]).is_relative_to(vidaccel.__path__[0]) and "/tests/" not in files[-1]:
            return f"refused: {worded(error)}"
        raise
    replaced = [note for note in report.notes if "were replaced after accelerate" in note]
    layers = build(name).layers
    if replaced:
        assert not report.records, "processors that were replaced, and sparse calls all the same"
        close(dense, stock)
        close(sparse, stock)
        return f"told: {replaced[0].partition(' (')[0]}"
    close(dense, stock)
    ran = list(by_pass(report).values())
    assert not any(r.reason for r in report.records), "dense calls where none should be"
    assert ran[0] == Counter(range(layers)), f"sparse calls by layer in the first pass: {ran[0]}"
    if lever.caches:
        assert 0 < len(ran[1]) < layers or layers == 1, f"layers in a cached pass: {sorted(ran[1])}"
    assert not torch.allclose(sparse[0], stock[0], **CLOSE), "the sparse output is the dense one"
    expected = reference(name, lever)
    if lever.exact and not lever.caches:
        assert all(a.equal(b) for a, b in zip(sparse, expected, strict=True)), "not to the bit what it should be"
    close(sparse[:1], expected[:1])
    return "works"


def accelerated(
    name: str, lever: Lever, order: str, schedule: DenseSchedule, stock: list[torch.Tensor]
) -> tuple[list[torch.Tensor], RunReport]:
    """Outputs of a fresh model with the lever under sparse attention, which is removed without a trace."""
    tiny = build(name)
    if order == ORDERS[0]:
        lever.apply(tiny)
    handle = accelerate(tiny.model, SPARSE, schedule=schedule)
    if order != ORDERS[0]:
        lever.apply(tiny)
    out, report = passes(tiny, lever), handle.report()
    handle.remove()
    assert not any(isinstance(getattr(m, "processor", None), SparseProcessor) for m in tiny.model.modules())
    if not lever.caches:  # a cache remembers what came before
        assert all(a.equal(b) for a, b in zip(passes(tiny, lever), stock, strict=True)), "remove() left a trace"
    return out, report


def reference(name: str, lever: Lever) -> list[torch.Tensor]:
    """Sparse outputs of a model without the lever, with the weights that the lever stands for."""
    tiny, fresh = build(name), build(name)
    lever.apply(tiny)
    lever.same_as(tiny.model, fresh.model)
    with accelerate(fresh.model, SPARSE, schedule=NEVER_DENSE):
        return passes(fresh, None)


def passes(tiny: Tiny, lever: Lever | None) -> list[torch.Tensor]:
    """One forward pass, or two that differ a little where a cache is at work."""
    caches = lever is not None and lever.caches
    context = getattr(tiny.model, "cache_context", None) if caches else None
    with context("cond") if context else contextlib.nullcontext():
        outs = [tiny.run()]
        if caches:
            outs.append(tiny.run(**tiny.changed(0, 1, 2)))
    return outs


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
    """The first sentence of an error, without what changes from run to run."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {text}"[:200]
